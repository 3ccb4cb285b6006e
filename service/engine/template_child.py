"""The child process that parses and renders clients' chat templates; `templates` starts it and talks to it.

    python -I template_child.py MEMORY_BYTES TEXT_BYTES CPU_S WALL_S

Requests and answers are JSON, each after its length in 8 bytes, on standard input and output. A template's text can
make any number of steps and bytes, so it is rendered in a fork of this process that can open no file and no socket,
start no process and use no more than the given memory; two timers end the fork in the midst of a render that takes too
long, whatever it is doing. The next fork is there some milliseconds later. Nothing of this project is imported.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

import jinja2
import jinja2.meta
from jinja2 import nodes
from transformers.utils import chat_template_utils

LENGTH = struct.Struct(">Q")
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
MAX_REASON = 500
"""Characters of an error that are answered."""
Expression = nodes.Expr | nodes.Node | None


def require(owner: Any, name: str) -> None:
    """End this process when a library no longer has a private name that is used here."""
    if not hasattr(owner, name):
        sys.exit(f"{owner.__name__} has no {name}: install the pins in requirements/")


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def limit_process(memory: int) -> None:
    """Take from this process what rendering does not need; `memory` bytes may be added to what it has now."""
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


def _without_filters(node: Expression) -> Expression:
    while isinstance(node, nodes.Filter | nodes.Test):
        node = node.node
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _without_filters(node.node)
    return node


def _is_content(node: Expression, names: set[str]) -> bool:
    """Whether an expression is the content of a message, or a variable among `names`."""
    node = _without_filters(node)
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Name) and node.name in names


def _content_names(tree: nodes.Template) -> set[str]:
    """Variables that hold the content of a message: by their name, or as parameters of macros that get one."""
    macros = tree.find_all(nodes.Macro)
    return {"content"}.union(*(_content_parameters(macro, tree) for macro in macros))


def _content_parameters(macro: nodes.Macro, tree: nodes.Template) -> Iterator[str]:
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            for parameter, value in zip(macro.args, call.args, strict=False):
                if _is_content(value, set()):
                    yield parameter.name
            yield from (keyword.key for keyword in call.kwargs if _is_content(keyword.value, set()))


def inspect(template: str) -> dict[str, Any]:
    """The variables that a template reads, and whether it goes through the parts of a content ("openai") or takes it
    as one text ("string").
    """
    tree = _compile(template).environment.parse(template)
    names = _content_names(tree)
    parts = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    return {"format": "openai" if parts else "string", "variables": sorted(jinja2.meta.find_undeclared_variables(tree))}


def _compile(template: str) -> jinja2.Template:
    require(chat_template_utils, "_compile_jinja_template")
    compiled: jinja2.Template = chat_template_utils._compile_jinja_template(template)
    return compiled


def render(template: str, messages: list[Any], arguments: dict[str, Any], max_bytes: int) -> dict[str, Any]:
    """The text that the template makes of `messages`, as the tokenizer's `apply_chat_template` would."""
    (text,), _ = chat_template_utils.render_jinja_template([messages], chat_template=template, **arguments)
    if len(text) > max_bytes or len(text.encode()) > max_bytes:
        return {"error": f"its text is longer than {max_bytes} bytes"}
    return {"text": text}


def answer(request: dict[str, Any], max_bytes: int) -> dict[str, Any]:
    """What a request asks for, or an `error` that says why the template cannot be used."""
    try:
        if "messages" in request:
            return render(request["template"], request["messages"], request["arguments"], max_bytes)
        return inspect(request["template"])
    except jinja2.TemplateSyntaxError as error:
        reason = f"not a valid Jinja template, line {error.lineno}: {error.message}"
    except MemoryError:
        reason = "it needs too much memory"
    except RecursionError:
        reason = "it is nested too deeply"
    except Exception as error:  # whatever a template raises is said to the client that brought it
        reason = str(error) or type(error).__name__
    return {"error": reason[:MAX_REASON]}


def read(stream: BinaryIO) -> bytes | None:
    """The next message; None at the end of the stream."""
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


def serve(max_bytes: int, cpu_s: float, wall_s: float) -> None:
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


def main() -> None:
    """Fork the process that answers, and again whenever a limit has ended it."""
    memory, max_bytes, cpu_s, wall_s = (float(text) for text in sys.argv[1:])
    time.tzset()
    # Imports and caches that a render needs are there before files can no longer be opened.
    sample = "{% for m in messages %}{{ m.content | tojson }}{{ strftime_now('%Y') }}{% endfor %}"
    answer({"template": sample, "messages": [{"role": "user", "content": "x"}], "arguments": {}}, 1000)
    answer({"template": "{{ raise_exception('x') }}{% for"}, 1000)
    end_with_parent()
    is_first = True
    while True:
        if (pid := os.fork()) == 0:
            end_with_parent()
            limit_process(int(memory))
            if is_first:
                write(sys.stdout.buffer, {"ready": os.getpid()})
            serve(int(max_bytes), cpu_s, wall_s)
            os._exit(0)
        is_first = False
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            return
        is_slow = os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
        reason = f"it takes more than {cpu_s:g} s to render" if is_slow else "it needs too much memory"
        write(sys.stdout.buffer, {"error": reason})


def write(stream: BinaryIO, reply: Any) -> None:
    """Send one message."""
    data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
    stream.write(LENGTH.pack(len(data)) + data)
    stream.flush()


if __name__ == "__main__":
    main()
