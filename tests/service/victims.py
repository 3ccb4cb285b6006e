"""A server that faults happen to, kept up as an init system would, and clients that know what it has acknowledged."""

import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from benchmarks.servers import free_port
from tests.conftest import ROOT, family
from tests.service.churn import Answer, History, Subject, Version, make_body, read_answer
from tests.service.churn_clients import Guest
from tests.service.proofs import make_draw
from tests.service.source_servers import Host
from tests.service.tiny import Kit

READY_S = 400
"""From a fault to a server that answers, on a busy machine; starting one takes some ten seconds."""
STEADY = 3
"""Answers in a row after which a server has recovered."""
PROFILES, GUESTS = 4, 4
REFUSED_S = 0.5
"""What a client waits before it asks again: a server that starts needs the cores."""
DOCUMENTED = (429, 503, 507)
"""What a server answers that cannot do what it is asked for at this time."""
CLOCK = """
import os, time
read, file, state = time.time, os.environ["CLOCK_FILE"], [0.0, 0.0]
def read_set_clock():
    now = time.monotonic()
    if now > state[1]:
        state[1] = now + 0.1
        try:
            state[0] = float(open(file).read())
        except (OSError, ValueError):
            pass
    return read() + state[0]
time.time = read_set_clock
"""
"""A `sitecustomize`: all Python processes of the server read their clock so many seconds off as a file says."""


@dataclass
class Victim:
    """A server on the folder `data`, and the clients' knowledge of it."""

    kit: Kit
    folder: Path
    data: Path
    settings: dict[str, str]
    subjects: Sequence[Subject]
    guests: Sequence[Guest]
    guest_form: str
    source: Host | None = None
    """Where it may fetch adapters from."""
    alone: list[Answer] = field(default_factory=list)
    profiles_alone: list[Answer] = field(default_factory=list)
    """What a profile that says each subject is answered with."""
    guests_alone: list[Answer] = field(default_factory=list)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    ends: list[str] = field(default_factory=list)
    """What it said each time it ended by itself."""
    silent: list[str] = field(default_factory=list)
    """Ends without a sentence."""
    is_faulty: bool = False
    """While a fault lasts, and until the server has recovered."""
    is_damaged: bool = False
    """While it holds something else than it has acknowledged: clients wait."""
    profiles: list[History] = field(default_factory=lambda: [History() for _ in range(PROFILES)])
    brought: list[History] = field(default_factory=lambda: [History() for _ in range(GUESTS)])
    """Of uploaded adapters: the number of the guest that each name stands for, -1 once it was deleted."""
    statuses: Counter[int] = field(default_factory=Counter)
    acknowledged: int = 0
    compared: int = 0
    cut: int = 0
    faults: list[str] = field(default_factory=list)
    """What clients were answered that they must never be."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.folder / f"log-{self.starts}"

    def start(self) -> None:
        """Start it, as its init system does."""
        self.starts += 1
        (self.folder / "sitecustomize.py").write_text(CLOCK)
        (self.folder / "t").mkdir(exist_ok=True)
        self.process, _ = self.kit.serve(
            self.data,
            self.log,
            FUSION_PORT=str(self.port),
            CLOCK_FILE=str(self.folder / "clock"),
            PYTHONPATH=os.pathsep.join([str(self.folder), str(ROOT)]),
            TMPDIR=str(self.folder / "t"),
            **self.settings,
        )

    def find(self, name: str) -> int:
        """The process whose command line has `name`; 0 when there is none."""
        for pid in family(self.process.pid) if self.process else []:
            with suppress(OSError):
                if name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return 0

    def kill(self) -> None:
        """SIGKILL for its first process, with which the kernel ends all others."""
        if self.process is not None and self.process.poll() is None:
            everyone = family(self.process.pid)
            self.process.kill()
            self.process.wait(30)
            deadline = time.monotonic() + 30
            while any(family(pid) for pid in everyone) and time.monotonic() < deadline:
                time.sleep(0.02)

    def stop(self) -> int:
        """End it in order; its exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def read_end(self) -> str:
        """What it said when it ended by itself; empty without a sentence."""
        lines = reversed(self.log.read_text(errors="replace").splitlines())
        return next((line for line in lines if line.startswith("error: ")), "")

    def keep_up(self, limit_s: float = READY_S) -> float:
        """Start it again whenever it has ended, until it is ready; seconds that took."""
        began = time.monotonic()
        while time.monotonic() - began < limit_s:
            if self.process is None or (code := self.process.poll()) is None:
                with suppress(httpx.HTTPError):
                    if self.process and httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                        return time.monotonic() - began
            elif code != -signal.SIGKILL:  # not one of ours
                sentence = self.read_end()
                self.ends.append(sentence) if sentence else self.silent.append(f"{self.log}: exit {code}")
            if self.process is None or self.process.poll() is not None:
                self.start()
            time.sleep(0.05)
        raise AssertionError(f"not ready within {limit_s:g} s: {self.log.read_text(errors='replace')[-3000:]}")

    def send(self, method: str, path: str, timeout: float = 60, **more: Any) -> httpx.Response:
        return httpx.request(method, f"{self.url}{path}", timeout=timeout, **more)

    def ask(self, body: dict[str, Any], timeout: float = 60) -> httpx.Response:
        return self.send("POST", "/v1/completions", timeout, json=body)

    def learn(self) -> None:
        """Ask everything while nothing else happens, which gives what is right."""
        self.alone = [read_answer(self.ask(subject.body()).raise_for_status()) for subject in self.subjects]
        prompt = self.subjects[0].prompt
        self.profiles_alone = [read_answer(self.ask(replace(s, prompt=prompt).body())) for s in self.subjects]
        for i in range(len(self.guests)):
            assert self.upload("guest-alone", i).status_code == 201
            answer = self.ask(self.guest_body("guest-alone")).raise_for_status()
            self.guests_alone.append(read_answer(answer))
            self.send("DELETE", "/v1/adapters/guest-alone").raise_for_status()

    def guest_body(self, name: str) -> dict[str, Any]:
        return make_body(self.subjects[0].prompt, model=self.guest_form.format(name))

    def upload(self, name: str, guest: int) -> httpx.Response:
        """Have the adapter `name` stand for a guest."""
        headers = {"content-type": "application/octet-stream", "x-fusion-upload": "1"}
        query = {"name": name, "replace": "true", "config": self.guests[guest].config}
        return self.send("POST", "/v1/adapters", params=query, content=self.guests[guest].weights, headers=headers)

    def change(self, draw: Any) -> int:
        """Change a profile or an uploaded adapter, and note when that was acknowledged; the answer's status."""
        number, is_profile = draw.randrange(PROFILES), draw.random() < 0.6
        history = self.profiles[number] if is_profile else self.brought[number]
        choice = draw.randrange(len(self.subjects)) if is_profile else draw.randrange(-1, len(self.guests))
        version = Version(choice, time.monotonic())
        history.versions.append(version)
        if is_profile:
            recipe = {"fusion": self.subjects[choice].recipe}
            answer = self.send("PUT", f"/v1/fusions/kept-{number}", json=recipe)
        elif choice < 0:
            answer = self.send("DELETE", f"/v1/adapters/brought-{number}")
        else:
            answer = self.upload(f"brought-{number}", choice)
        self.statuses[answer.status_code] += 1
        if answer.status_code in (200, 201, 204, 404):
            version.ended = time.monotonic()
            self.acknowledged += 1
        else:
            self.note(answer, f"change of {'profile' if is_profile else 'adapter'} {number}")
        return answer.status_code

    def question(self, draw: Any) -> int:
        """Ask a recipe, a profile or an adapter, and compare; the answer's status."""
        kind, began = draw.choice(("recipe", "recipe", "profile", "adapter")), time.monotonic()
        number = draw.randrange({"recipe": len(self.subjects), "profile": PROFILES, "adapter": GUESTS}[kind])
        answer = self.ask(self.find_body(kind, number))
        self.statuses[answer.status_code] += 1
        self.check(kind, number, answer, began)
        return answer.status_code

    def find_body(self, kind: str, number: int) -> dict[str, Any]:
        if kind == "recipe":
            return self.subjects[number].body()
        if kind == "profile":
            return make_body(self.subjects[0].prompt, model=f"kept-{number}")
        return self.guest_body(f"brought-{number}")

    def check(self, kind: str, number: int, answer: httpx.Response, began: float) -> None:
        """Note an answer that is not one of those that were right at some time since `began`."""
        if kind == "recipe":
            possible = {number}
        else:
            history = self.profiles[number] if kind == "profile" else self.brought[number]
            possible = history.between(began, time.monotonic()) or {-1}
            if all(version.ended == float("inf") for version in history.versions):
                possible.add(-1)  # nothing was ever acknowledged
        if answer.status_code != 200:
            if answer.status_code != 404 or -1 not in possible:
                self.note(answer, f"{kind} {number}")
            return
        self.compared += 1
        known = {"recipe": self.alone, "profile": self.profiles_alone, "adapter": self.guests_alone}[kind]
        got = read_answer(answer)
        if not any(known[i].digest == got.digest and not known[i].differs(got) for i in possible if i >= 0):
            self.faults.append(f"WRONG {kind} {number}: {got} is none of {possible}"[:500])

    def note(self, answer: httpx.Response, what: str) -> None:
        """Note a refusal that is none, or comes when nothing is wrong."""
        is_documented = answer.status_code in DOCUMENTED and (
            answer.status_code == 507 or "retry-after" in answer.headers
        )
        if not is_documented and not (self.is_faulty and answer.status_code == 500):
            self.faults.append(f"{what}: {answer.status_code} {answer.text[:300]}")

    def recover(self) -> None:
        """Return once it is ready and a recipe is answered, for a while: a killed engine is missed only then."""
        began, good = time.monotonic(), 0
        while good < STEADY:
            assert time.monotonic() - began < READY_S, f"no answer: {self.log.read_text(errors='replace')[-3000:]}"
            self.keep_up()
            with suppress(httpx.HTTPError):
                good = good + 1 if self.ask(self.subjects[0].body()).status_code == 200 else 0
            time.sleep(0.3)

    def verify(self) -> None:
        """Ask everything once: what was acknowledged is there, and all answers are right."""
        for kind, count in (("recipe", len(self.subjects)), ("profile", PROFILES), ("adapter", GUESTS)):
            for number in range(count):
                began = time.monotonic()
                answer = self.ask(self.find_body(kind, number))
                if answer.status_code in DOCUMENTED:  # a queue that the fault has left
                    time.sleep(1)
                    answer = self.ask(self.find_body(kind, number))
                if answer.status_code not in (200, 404):
                    self.faults.append(f"after recovery {kind} {number}: {answer.status_code} {answer.text[:300]}")
                else:
                    self.check(kind, number, answer, began)

    @contextmanager
    def load(self, *part: object) -> Iterator[None]:
        """Two clients ask and one changes, for the block."""
        end = threading.Event()

        def run(what: Any, pause_s: float, *name: object) -> None:
            draw = make_draw(*part, *name)
            while not end.is_set():
                status = 0
                try:
                    status = 0 if self.is_damaged else what(draw)
                except httpx.HTTPError:
                    self.cut += 1
                end.wait(pause_s if 200 <= status < 500 else REFUSED_S)

        questions = [(self.question, 0.02, "question", number) for number in range(2)]
        work: list[Any] = [*questions, (self.change, 0.2, "change")]
        threads = [threading.Thread(target=run, args=one, daemon=True) for one in work]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            end.set()
            for thread in threads:
                thread.join(90)
