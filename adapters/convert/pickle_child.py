"""The child process that reads a pickle of tensors; `pickles` starts it.

    python -I pickle_child.py MEMORY_BYTES < adapter_model.bin > adapter_model.safetensors

torch reads the pickle with `weights_only=True`, which calls nothing that the file names. Should that ever fail, what
runs then can open no file and no socket, start no process and change nothing: this process gives up all of it before it
looks at the file, and on Linux the kernel then refuses every call that is not among those of `CALLS`. Standard input
is the file, open to be read; standard output the only thing it can write to. An error is one line on standard error
and the exit status 3. Nothing of this project is imported.
"""

import ctypes
import errno
import io
import os
import resource
import signal
import struct
import sys
import zipfile
from typing import Any

import safetensors.torch
import torch

FAILED = 3
MAX_REASON = 400
CPU_S = 600
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
"""Instructions of the kernel's packet filter (linux/bpf_common.h)."""
CALL, ARCHITECTURE = 0, 4
"""Offsets in `struct seccomp_data`."""
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CALLS = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "getpid": (39, 172),
    "exit": (60, 93),
    "getrusage": (98, 165),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "clock_gettime": (228, 113),
    "exit_group": (231, 94),
    "tgkill": (234, 131),
    "getrandom": (318, 278),
    "rseq": (334, 293),
}
"""The calls that reading memory and two open files takes, with their numbers on x86-64 and on 64-bit Arm."""


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def confine(memory: int) -> None:
    """Give up everything that reading standard input and writing standard output does not need; `memory` bytes may be
    added to what this process has now. OSError when the kernel does not do it.
    """
    if sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            size = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory,) * 2)
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    if sys.platform == "linux":
        _filter_calls()


def _filter_calls() -> None:
    """Have the kernel refuse every call that is not in CALLS (seccomp(2))."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"calls cannot be refused on {machine!r}, only on {', '.join(MACHINES)}")
    numbers = [numbers[list(MACHINES).index(machine)] for numbers in CALLS.values()]
    steps = [(LOAD, 0, 0, ARCHITECTURE), (JUMP_IF_EQUAL, 0, len(numbers) + 1, MACHINES[machine]), (LOAD, 0, 0, CALL)]
    steps += [(JUMP_IF_EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    steps += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_, 0, 0)):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), f"calls cannot be refused: {os.strerror(ctypes.get_errno())}")


def read_tensors(file: Any) -> dict[str, torch.Tensor]:
    """The tensors in a pickle by name; ValueError when it holds anything else."""
    content = torch.load(file, map_location="cpu", weights_only=True)
    for key in ("state_dict", "module", "model"):  # as some trainers wrap them
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, not tensors by name")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided):
            raise ValueError(f"under {name!r:.100} it holds {type(value).__name__}, not a plain tensor")
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in content.items()}


def warm_up() -> None:
    """Have everything imported that reading needs, since no file can be opened later."""
    for new in (True, False):
        sample = io.BytesIO()
        torch.save({"a": torch.ones(2, dtype=torch.bfloat16)}, sample, _use_new_zipfile_serialization=new)
        sample.seek(0)
        safetensors.torch.save(read_tensors(sample))
    for damaged in (b"", b"PK", b"\x80\x02cos\nsystem\n."):
        try:
            read_tensors(io.BytesIO(damaged))
        except Exception as error:
            str(error)


def main() -> int:
    """Read standard input and write standard output; the exit status."""
    end_with_parent()
    torch.set_num_threads(1)
    warm_up()
    try:
        confine(int(sys.argv[1]))
        content = safetensors.torch.save(read_tensors(io.BytesIO(sys.stdin.buffer.read())), metadata={"format": "pt"})
    except MemoryError:
        return fail("it needs too much memory")
    except zipfile.BadZipFile as error:
        return fail(f"it is damaged: {error}")
    except Exception as error:  # whatever the file does to torch is its fault
        return fail(str(error) or type(error).__name__)
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
    return 0


def fail(reason: str) -> int:
    """Say why, on one line."""
    sys.stderr.write(" ".join(reason.split())[:MAX_REASON] + "\n")
    sys.stderr.flush()
    return FAILED


if __name__ == "__main__":
    status = main()
    os._exit(status)  # what runs at an interpreter's end may want what was given up
