"""The attacks of `benchmarks.attacks`: each brings one kind of hostile request and says what others saw of it.

What is sent holds no harmful text: huge numbers, long headers, loops, and clients that do not read.
"""

import io
import json
import os
import signal
import socket
import struct
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.common import BASE_NAME
from benchmarks.servers import family

ENGINE = "--dtype float32 --max-model-len 4096 --max-num-seqs 64"
LIMIT_S = 30.0
"""How long anything is waited for; "over 30 s" usually means for ever."""
HIDDEN = 576
MODULE = "base_model.model.model.layers.0.self_attn.o_proj"
UPLOAD = {"x-fusion-upload": "1"}


@dataclass(frozen=True, slots=True)
class Target:
    """A server under attack."""

    url: str
    process: subprocess.Popen[bytes]
    data: Path

    def ask(self, method: str, path: str, limit: float = LIMIT_S, **request: object) -> httpx.Response | None:
        """The answer, or None when there was none within `limit` seconds."""
        with suppress(httpx.HTTPError):
            return httpx.request(method, self.url + path, timeout=limit, **request)  # type: ignore[arg-type]  # passed on
        return None

    def complete(self, prompt: str, model: str = BASE_NAME, limit: float = LIMIT_S) -> httpx.Response | None:
        """A short greedy completion with log-probabilities."""
        body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 1}
        return self.ask("POST", "/v1/completions", limit, json=body)

    def upload(self, name: str, content: bytes, limit: float = LIMIT_S) -> httpx.Response | None:
        """An upload of an adapter's archive."""
        files = {"file": ("a.tar", content)}
        return self.ask("POST", "/v1/adapters", limit, data={"name": name}, files=files, headers=UPLOAD)

    def start(self, call: Callable[[], object]) -> None:
        """Run `call` beside what follows."""
        threading.Thread(target=call, daemon=True).start()


Serve = Callable[..., AbstractContextManager[Target]]
Outcomes = Mapping[str, str]


def seconds(call: Callable[[], object]) -> str:
    """How long `call` took, as text; it returns None when it gave up."""
    began = time.monotonic()
    answered = call() is not None
    took = time.monotonic() - began
    return f"{took:.2g} s" if answered else f"over {LIMIT_S:g} s"


def status(answer: httpx.Response | None) -> str:
    """The status of an answer."""
    return "no answer" if answer is None else str(answer.status_code)


def pack(header: Mapping[str, object], data: bytes, config: Mapping[str, object]) -> bytes:
    """A .tar of an adapter whose safetensors header and configuration are given."""
    head = json.dumps(header).encode()
    files = {"adapter_model.safetensors": struct.pack("<Q", len(head)) + head + data}
    files["adapter_config.json"] = json.dumps(config).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def make_adapter(number: float, module: str = MODULE, **config: object) -> bytes:
    """An adapter of rank 1 all of whose numbers are `number`."""
    factor = struct.pack("<f", number) * HIDDEN
    size = len(factor)
    header = {
        f"{module}.lora_A.weight": {"dtype": "F32", "shape": [1, HIDDEN], "data_offsets": [0, size]},
        f"{module}.lora_B.weight": {"dtype": "F32", "shape": [HIDDEN, 1], "data_offsets": [size, 2 * size]},
    }
    known = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": None}
    return pack(header, factor * 2, known | config)


def spoil_answers(serve: Serve) -> Outcomes:
    """Huge finite numbers that overflow in the engine, then fresh prompts of others."""
    # Few blocks, so that others soon get those that the huge numbers were in.
    with serve("spoil", FUSION_ENGINE_ARGS=f"{ENGINE} --num-gpu-blocks-override 48") as target:
        prompts = [" ".join(f"word{i}{n}" for i in range(3 + 7 * n)) for n in range(10)]
        accepted = [
            status(target.upload(f"huge{i}", make_adapter(10.0**exponent))) for i, exponent in enumerate((38, 18))
        ]
        for n in range(6):
            for model in ("huge0", "16*huge1"):
                target.complete(" ".join(f"loud{model[0]}{n}{i}" for i in range(20 * 2**n)), model)
        answers = [target.complete(prompt, model) for prompt in prompts for model in (BASE_NAME, "task", "balanced")]
        spoiled = sum(answer is None or answer.status_code != 200 for answer in answers)
        listed = status(target.ask("GET", "/v1/adapters"))
        written = target.ask(
            "POST",
            "/v1/unload_lora_adapter",
            content='{"lora_name": "nobody"}',
            headers={"content-type": "text/plain", "origin": "http://other.example", "host": "other.example"},
        )
        refused = status(written) in ("403", "415", "421")
        return {
            "huge numbers": f"uploads {' and '.join(accepted)}; {spoiled} of {len(answers)} answers of others spoiled",
            "list after huge numbers": listed,
            "write from a web page": status(written) + ("" if refused else ", read by the route"),
            "large body": send_large_body(target),
        }


def send_large_body(target: Target) -> str:
    """200 MB of JSON, and the longest wait of /livez meanwhile."""
    body = b'{"model": "' + b"x" * 200_000_000 + b'"}'
    answers: list[httpx.Response | None] = []
    headers = {"content-type": "application/json"}
    sender = threading.Thread(
        target=lambda: answers.append(target.ask("POST", "/v1/completions", content=body, headers=headers))
    )
    sender.start()
    waits = [0.0]
    while sender.is_alive():
        began = time.monotonic()
        target.ask("GET", "/livez")
        waits.append(time.monotonic() - began)
        time.sleep(0.01)
    return f"{status(answers[0]) if answers else 'no answer'}; others waited up to {max(waits):.2g} s"


def render_endless_template(serve: Serve) -> Outcomes:
    """A profile's chat template that loops ten thousand million times."""
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with serve("template") as target:
        body = {"fusion": "1*task", "defaults": {"chat_template": loops}}
        kept = status(target.ask("PUT", "/v1/fusions/endless", json=body))
        chat = {"model": "endless", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        target.start(lambda: target.ask("POST", "/v1/chat/completions", 3, json=chat))
        time.sleep(1)
        return {
            "endless template": f"PUT {kept}; another client's answer after {seconds(lambda: target.complete('Hello'))}"
        }


def match_exponential_pattern(serve: Serve) -> Outcomes:
    """A pattern that takes 2^50 steps, and then SIGTERM."""
    with serve("pattern") as target:
        pattern = "(.|.)" * 50 + "x"
        module = "base_model.model." + "a" * 80
        archive = make_adapter(1.0, module, rank_pattern={pattern: 8})
        target.start(lambda: target.upload("slow", archive, 3))
        time.sleep(1)
        waited = seconds(lambda: target.ask("GET", "/livez"))
        processes = family(target.process.pid)
        target.process.send_signal(signal.SIGTERM)
        ended = seconds(lambda: wait_gone(processes))
        return {"exponential pattern": f"/livez after {waited}", "stop after it": ended}


def wait_gone(processes: list[int]) -> bool | None:
    """True once none of the processes is alive; None when one still is after LIMIT_S."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() and family(pid) for pid in processes):
            return True
        time.sleep(0.1)
    return None


def send_bad_files(serve: Serve) -> Outcomes:
    """Archives that never end or grow, and a header of dimensions whose product takes hours."""
    with serve("files") as target:
        entry = {"dtype": "F32", "shape": [2**47 - 1] * 80_000, "data_offsets": [0, 4]}
        dims = pack({f"{MODULE}.lora_A.weight": entry}, b"\0" * 4, {"peft_type": "LORA", "r": 1, "lora_alpha": 1})
        loop = bytearray(tarfile.TarInfo("adapter_config.json").tobuf())
        loop[124:136] = b"\xff" * 10 + struct.pack(">h", -512)  # base-256: a negative size
        loop[148:156] = b" " * 8
        loop[148:156] = f"{sum(loop):06o}\0 ".encode()
        outcomes = {
            "archive that loops": f"answered after {seconds(lambda: target.upload('loop', bytes(loop) + bytes(1024)))}"
        }
        digits = tarfile.TarInfo("pax")
        digits.type, digits.size = tarfile.XHDTYPE, 80_000
        pax = digits.tobuf(tarfile.USTAR_FORMAT) + b"1" * 80_384 + bytes(1024)
        for name, archive in (("archive of digits", pax), ("header of dimensions", dims)):
            target.start(lambda archive=archive: target.upload("bad", archive, 60))  # type: ignore[misc]  # bound now
            time.sleep(0.5)
            outcomes[name] = f"/livez after {seconds(lambda: target.ask('GET', '/livez'))}"
        return outcomes


@contextmanager
def silent_readers(target: Target, count: int) -> Iterator[None]:
    """Connections that each ask for a build of their own, streamed, and do not read."""
    sockets = []
    for i in range(count):
        recipe = f"svd({0.3 + 0.1 * i}*task + 0.5*safety, rank=8)"
        body = json.dumps({"model": recipe, "prompt": "Tell", "max_tokens": 2000, "stream": True, "ignore_eos": True})
        lines = ["POST /v1/completions HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"]
        head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, _, port = target.url.removeprefix("http://").partition(":")
        reader.connect((host, int(port)))
        reader.sendall((head + body).encode())
        sockets.append(reader)
    try:
        yield
    finally:
        for reader in sockets:
            reader.close()


def hold_places(serve: Serve) -> Outcomes:
    """As many silent readers as the engine has places; then another recipe, and a delete."""
    with serve("readers", FUSION_MAX_CPU_LORAS="4") as target, silent_readers(target, 4):
        time.sleep(5)
        recipe = "svd(1*task + 0.1*safety, rank=8)"
        with ThreadPoolExecutor(2) as threads:
            other = threads.submit(lambda: seconds(lambda: target.complete("Hello", recipe, 2 * LIMIT_S)))
            gone = threads.submit(lambda: seconds(lambda: target.ask("DELETE", "/v1/fusions/nobody")))
            outcome = f"another recipe answered after {other.result()}, a delete after {gone.result()}"
            return {"readers that do not read": outcome}


def kill_engine(serve: Serve) -> Outcomes:
    """`kill -9` of the engine's process: how long /livez goes unanswered."""
    with serve("engine") as target:
        for pid in family(target.process.pid):
            if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
        time.sleep(3)
        longest, deadline = 0.0, time.monotonic() + 40
        while time.monotonic() < deadline:
            began = time.monotonic()
            while target.ask("GET", "/livez", 2) is None and time.monotonic() < deadline:
                time.sleep(0.1)
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.1)
        return {"death of the engine": f"/livez unanswered for up to {longest:.2g} s"}


def flip_bits(serve: Serve) -> Outcomes:
    """Every fourth byte of the second half of an adapter's stored weights changed while the server is down; then a
    fusion that has to read them.
    """
    recipe, prompt = "svd(0.9*task + 0.1*safety, rank=8)", "The capital of France is"
    with serve("whole") as target:
        expected = target.complete(prompt, recipe)
    with serve("bits"):
        pass
    for file in (target.data.parents[1] / "bits/data").glob("adapters/*/adapter/adapter_model.safetensors"):
        content = bytearray(file.read_bytes())
        for at in range(len(content) // 2, len(content), 4):
            content[at] ^= 1
        file.write_bytes(content)
    with serve("bits") as target:
        answer = target.complete(prompt, recipe)
    if expected is None or answer is None or answer.status_code != 200:
        return {"damaged weights": f"refused: {status(answer)}"}
    one, two = (each.json()["choices"][0]["logprobs"]["token_logprobs"] for each in (expected, answer))
    same = all(abs(x - y) < 1e-6 for x, y in zip(one, two, strict=True))
    return {"damaged weights": f"200, {'the same' if same else 'other'} numbers"}


SCENES: Mapping[str, Callable[[Serve], Outcomes]] = {
    scene.__name__: scene
    for scene in (
        spoil_answers,
        render_endless_template,
        match_exponential_pattern,
        send_bad_files,
        hold_places,
        kill_engine,
        flip_bits,
    )
}
