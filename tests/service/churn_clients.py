"""Clients of three tenants on one server: each step asks, switches, uploads, lists or leaves, and checks what came."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

import httpx

from tests.service.churn import Answer, History, Subject, Version, make_body, read_answer
from tests.service.proofs import make_draw

PROFILES = 6
REFUSALS = (429, 503)
"""Documented answers of a server that has much to do; they have Retry-After."""


@dataclass(frozen=True)
class Guest:
    """An adapter that clients bring: a weights file and its config."""

    config: str
    weights: bytes


@dataclass
class Tenant:
    """A tenant's client, and what its profiles have said."""

    name: str
    http: httpx.Client
    profiles: list[History] = field(default_factory=lambda: [History() for _ in range(PROFILES)])
    locks: list[threading.Lock] = field(default_factory=lambda: [threading.Lock() for _ in range(PROFILES)])


class RefusedError(Exception):
    """A documented refusal; the step ends there."""


@dataclass
class Clients:
    """The tenants, what there is to ask, and what came out."""

    tenants: Sequence[Tenant]
    subjects: Sequence[Subject]
    alone: Sequence[Answer]
    """What each subject is answered with when nothing else is asked."""
    profiles_alone: Sequence[Answer]
    """What a profile that says each subject is answered with, to the first one's prompt."""
    guests: Sequence[Guest]
    guests_alone: Sequence[Answer]
    guest_form: str
    """The recipe that guests are asked in, `{}` is their name."""
    requests: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self, number: int) -> None:
        """One step, the same for the same seed and number."""
        draw = make_draw("step", number)
        tenant = draw.choice(self.tenants)
        what: Callable[[Clients, Tenant, Random], None] = draw.choices(list(STEPS), list(STEPS.values()))[0]
        try:
            what(self, tenant, draw)
        except RefusedError:
            pass
        except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
            with self._lock:
                self.lost.append(f"{what.__name__} {number}: {error!r:.300}")
        with self._lock:
            self.steps[what.__name__] += 1

    @contextmanager
    def send(
        self, tenant: Tenant, method: str, path: str, expected: Sequence[int], **more: object
    ) -> Iterator[httpx.Response]:
        """The answer to one request, which has one of these statuses, or is refused."""
        with tenant.http.stream(method, path, **more) as answer:  # type: ignore[arg-type]  # httpx's own
            with self._lock:
                self.requests += 1
                self.statuses[answer.status_code] += 1
            if answer.status_code in REFUSALS:
                assert "retry-after" in answer.headers, answer.read()
                raise RefusedError
            assert answer.status_code in expected, f"{answer.status_code} {answer.read()[:200]!r}"
            yield answer

    def ask(self, tenant: Tenant, body: Mapping[str, object]) -> Answer:
        """A whole answer."""
        with self.send(tenant, "POST", "/v1/completions", (200,), json=body) as answer:
            answer.read()
            with self._lock:
                self.sources[answer.headers.get("x-fusion-source", "")] += 1
            return read_answer(answer)

    def compare(self, what: str, answer: Answer, expected: Sequence[Answer]) -> None:
        """Note an answer that is none of the expected ones, and has none of their digests."""
        right = [one for one in expected if answer.digest == one.digest and not answer.differs(one)]
        with self._lock:
            self.compared += 1
            if not right:
                self.wrong.append(f"{what}: {answer}, expected {expected}"[:600])

    def ask_recipe(self, tenant: Tenant, draw: Random) -> None:
        """A recipe in the request."""
        i = draw.randrange(len(self.subjects))
        self.compare(str(self.subjects[i].recipe), self.ask(tenant, self.subjects[i].body()), [self.alone[i]])

    def ask_profile(self, tenant: Tenant, draw: Random) -> None:
        """A profile, whose meaning may change meanwhile: its answer is that of a version which then was current."""
        number, began = draw.randrange(PROFILES), time.monotonic()
        if not any(version.ended <= began for version in tenant.profiles[number].versions):
            return
        prompt = self.subjects[0].prompt
        answer = self.ask(tenant, make_body(prompt, model=f"profile-{number}"))
        said = tenant.profiles[number].between(began, time.monotonic())
        self.compare(f"{tenant.name}'s profile-{number}", answer, [self.profiles_alone[i] for i in said])

    def switch(self, tenant: Tenant, draw: Random) -> None:
        """Give a profile another recipe."""
        number, subject = draw.randrange(PROFILES), draw.randrange(len(self.subjects))
        with tenant.locks[number]:
            version = Version(subject, time.monotonic())
            tenant.profiles[number].versions.append(version)
            try:
                body = {"fusion": self.subjects[subject].recipe}
                with self.send(tenant, "PUT", f"/v1/fusions/profile-{number}", (200, 201), json=body):
                    version.ended = time.monotonic()
            except RefusedError:
                tenant.profiles[number].versions.remove(version)
                raise

    def leave(self, tenant: Tenant, draw: Random) -> None:
        """Read the beginning of a stream, and go."""
        subject = self.subjects[draw.randrange(len(self.subjects))]
        body = subject.body() | {"max_tokens": 100, "stream": True}
        with self.send(tenant, "POST", "/v1/completions", (200,), json=body) as answer:
            for _, line in zip(range(draw.randrange(4)), answer.iter_lines(), strict=False):
                assert "error" not in line, line

    def bring(self, tenant: Tenant, draw: Random) -> None:
        """Upload an adapter, ask it, replace it, ask it again, delete it, and find it gone."""
        name = f"guest-{draw.randrange(10**9)}"
        model = self.guest_form.format(name)
        body = make_body(self.subjects[0].prompt, model=model)
        headers = {"content-type": "application/octet-stream", "x-fusion-upload": "1"}
        try:
            for turn, i in enumerate(draw.sample(range(len(self.guests)), 2)):
                query = {"name": name, "replace": str(turn == 1).lower(), "config": self.guests[i].config}
                more = {"params": query, "content": self.guests[i].weights, "headers": headers}
                with self.send(tenant, "POST", "/v1/adapters", (201, 200)[turn:][:1], **more):
                    pass
                self.compare(f"{model} as number {i}", self.ask(tenant, body), [self.guests_alone[i]])
        finally:
            with self.send(tenant, "DELETE", f"/v1/adapters/{name}", (204, 404)):
                pass
        with self.send(tenant, "POST", "/v1/completions", (404,), json=body):
            pass

    def ask_nonsense(self, tenant: Tenant, draw: Random) -> None:
        """What there is not, and what loses accuracy although that is forbidden."""
        prompt = self.subjects[0].prompt
        with self.send(tenant, "POST", "/v1/completions", (404,), json=make_body(prompt, model=f"no{draw.random()}")):
            pass
        lossy = make_body(prompt, model="svd(0.5*a + 0.5*d, rank=1)", strict=True)
        with self.send(tenant, "POST", "/v1/completions", (400,), json=lossy):
            pass

    def look(self, tenant: Tenant, draw: Random) -> None:
        """Read a list."""
        with self.send(tenant, "GET", draw.choice(("/v1/models", "/v1/fusions", "/v1/adapters")), (200,)) as answer:
            answer.read()


STEPS = {
    Clients.ask_recipe: 76,
    Clients.ask_profile: 8,
    Clients.switch: 4,
    Clients.leave: 4,
    Clients.bring: 2,
    Clients.ask_nonsense: 2,
    Clients.look: 4,
}
"""How often each step is taken, in a hundred."""
