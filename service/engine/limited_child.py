"""A child process's side of `children`: it answers requests about clients' texts within limits.

    python -I -c RUN ROOT MODULE MEMORY_BYTES TEXT_BYTES CPU_S WALL_S

Requests and answers are JSON, each after its length in 8 bytes, on standard input and output. They are answered in a
fork of this process that can open no file and no socket, start no process and use no more than the given memory; two
timers end the fork in the midst of work that takes too long, whatever it is doing. The next fork is there some
milliseconds later.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

LENGTH = struct.Struct(">Q")
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
Answer = Callable[[dict[str, Any], int], dict[str, Any]]
"""From a request, and the largest text in bytes, to the answer to it."""


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def limit_process(memory: int) -> None:
    """Take from this process what the work does not need; `memory` bytes may be added to what it has now."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        with open("/proc/self/statm") as statm:
            size = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory,) * 2)
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))
    for timer in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(timer, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF, signal.SIGALRM))


def read(stream: BinaryIO) -> bytes | None:
    """The next message; None at the end of the stream."""
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


def serve(answer: Answer, max_bytes: int, cpu_s: float, wall_s: float) -> None:
    """Answer requests until the server closes the pipe."""
    while (raw := read(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        signal.setitimer(signal.ITIMER_REAL, wall_s)
        try:
            reply = json.dumps(answer(json.loads(raw), max_bytes))
        except (MemoryError, RecursionError):
            reply = '{"error": "it needs too much memory"}'
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        write(sys.stdout.buffer, reply)


def run(answer: Answer, samples: list[dict[str, Any]]) -> None:
    """Fork the process that answers, and again whenever a limit has ended it; `samples` are requests of every kind."""
    memory, max_bytes, cpu_s, wall_s = (float(text) for text in sys.argv[2:])
    time.tzset()
    # Imports and caches that the work needs are there before files can no longer be opened.
    for sample in samples:
        answer(sample, 1000)
    end_with_parent()
    is_first = True
    while True:
        if (pid := os.fork()) == 0:
            end_with_parent()
            limit_process(int(memory))
            if is_first:
                write(sys.stdout.buffer, {"ready": os.getpid()})
            serve(answer, int(max_bytes), cpu_s, wall_s)
            os._exit(0)
        is_first = False
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            return
        is_slow = os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
        reason = f"it takes more than {cpu_s:g} s" if is_slow else "it needs too much memory"
        write(sys.stdout.buffer, {"error": reason})


def write(stream: BinaryIO, reply: Any) -> None:
    """Send one message."""
    data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
    stream.write(LENGTH.pack(len(data)) + data)
    stream.flush()
