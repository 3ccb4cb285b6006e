"""Thousands of requests for hundreds of recipes of every form, while everything changes: none is wrong, none is lost.

On a tiny base for the volume, and on the shipped one; each answer is compared with that of its recipe alone, before and
after. `make soak`, docs/reliability.md.
"""

import statistics
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save

from adapters.files import CONFIG, WEIGHTS
from tests.conftest import BASE_NAME, Server, stop, wait_ready
from tests.service.churn import FORMS, TOKENS, TOLERANCE, Answer, Subject, make_body, make_subjects, read_answer
from tests.service.churn_clients import Clients, Guest, Tenant
from tests.service.proofs import Limit, make_draw, record, size
from tests.service.test_soak import state
from tests.service.tiny import NAME, Kit, draw_prompt, make_shipped, make_tiny

pytestmark = pytest.mark.soak

REQUESTS = {NAME: size(20_000, 800), BASE_NAME: size(1_500, 150)}
RECIPES = {NAME: size(300, 40), BASE_NAME: size(60, 20)}
PARTS = 40
"""After each of so many parts of the requests the server's memory, files and series are read."""
THREADS, STACKS = 16, 6
OPERATOR = "operators-own-key-of-the-churn"
TENANTS = ("acme", "globex", "initech")
GUEST_FORM = "0.6*`{}` + 0.5*b"
FACTORS = (0.5, 1.0, 1.7)
"""Of the B of the adapters that clients bring."""
SETTLED = 10_000
"""Requests from which on memory is to have settled."""
GROWTH, SERIES_GROWTH = 1.03, 1.01
"""How much more memory and how many more series the last quarter of a full run may have than the second one."""
BY_ANSWER = "bentoml_service_request"
"""Series with these beginnings are of each kind of answer by each route, and begin with the first of its kind."""


@contextmanager
def serve(kit: Kit, folder: Path) -> Iterator[Server]:
    """A server with room for few stacks and builds, and a store too small for all of them."""
    settings = {
        "VLLM_API_KEY": OPERATOR,
        "FUSION_PUBLIC_METRICS": "true",
        "FUSION_MAX_CPU_LORAS": str(STACKS),
        "FUSION_MAX_CLIENT_PLACES": str(2 * STACKS),
        "FUSION_WAIT_TIMEOUT_S": "120",
    }
    process, url = kit.serve(folder / "data", folder / "log", **settings)
    try:
        wait_ready(process, url, folder / "log")
        yield Server(url, kit.adapters, folder / "data", process, folder / "log")
    finally:
        stop(process)


def make_guests(kit: Kit) -> list[Guest]:
    tensors = load_file(kit.adapters["a"] / WEIGHTS)
    config = (kit.adapters["a"] / CONFIG).read_text()
    scaled = ({k: v * factor if ".lora_B." in k else v for k, v in tensors.items()} for factor in FACTORS)
    return [Guest(config, save(one)) for one in scaled]


def ask_alone(http: httpx.Client, bodies: list[dict[str, Any]]) -> list[Answer]:
    """The answers, one after the other."""
    return [read_answer(http.post("/v1/completions", json=body).raise_for_status()) for body in bodies]


def ask_guests_alone(http: httpx.Client, guests: list[Guest], prompt: Any) -> list[Answer]:
    answers = []
    headers = {"content-type": "application/octet-stream", "x-fusion-upload": "1"}
    for guest in guests:
        query = {"name": "guest-alone", "config": guest.config}
        http.post("/v1/adapters", params=query, content=guest.weights, headers=headers).raise_for_status()
        answers += ask_alone(http, [make_body(prompt, model=GUEST_FORM.format("guest-alone"))])
        http.delete("/v1/adapters/guest-alone").raise_for_status()
    return answers


def open_clients(stack: ExitStack, server: Server) -> list[Tenant]:
    """A client of each tenant, with a deployer's key."""
    limits = httpx.Limits(max_connections=64)
    head = {"authorization": f"Bearer {OPERATOR}"}
    tenants = []
    for name in TENANTS:
        made = httpx.post(f"{server.url}/v1/keys", json={"role": "deployer", "tenant": name}, headers=head, timeout=60)
        headers = {"authorization": f"Bearer {made.raise_for_status().json()['key']}"}
        http = httpx.Client(base_url=server.url, headers=headers, timeout=300, limits=limits)
        tenants.append(Tenant(name, stack.enter_context(http)))
    return tenants


def run(clients: Clients, server: Server, count: int, limit: Limit) -> list[dict[str, Any]]:
    """Take steps until there were `count` requests; the server's states after each part of them."""
    states, number = list[dict[str, Any]](), 0
    with ThreadPoolExecutor(THREADS) as pool:
        while clients.requests < count and not limit.is_over:
            steps = max(1, count // PARTS)
            list(pool.map(clients.step, range(number, number + steps)))
            number += steps
            states.append({"requests": clients.requests, **state(server)})
            print(states[-1], len(clients.wrong), len(clients.lost), flush=True)
            states[-1] |= {"names": (names := list_series(server)), "series": len(names)}
    return states


def list_series(server: Server) -> set[str]:
    """All metric series, with their labels."""
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith(("#", BY_ANSWER))}


def describe(states: list[dict[str, Any]]) -> dict[str, Any]:
    """What memory, files and series did from the second quarter to the last one."""
    quarter = max(1, len(states) // 4)
    early, late = states[quarter : 2 * quarter] or states[-1:], states[-quarter:]
    settled = states[quarter:] or states
    new = states[-1]["names"] - set().union(*(state["names"] for state in early))
    slope = 0.0
    if len(settled) > 1:
        xs, ys = zip(*((state["requests"], state["memory_bytes"]) for state in settled), strict=True)
        slope = statistics.linear_regression(xs, ys).slope * 1000

    def median(part: list[dict[str, Any]], key: str) -> float:
        return float(statistics.median(state[key] for state in part))

    return {
        "memory_bytes": round(median(late, "memory_bytes")),
        "memory_growth": round(median(late, "memory_bytes") / median(early, "memory_bytes"), 4),
        "memory_slope_bytes_per_1000_requests": round(slope),
        "open_files": [median(early, "open_files"), median(late, "open_files")],
        "series": [median(early, "series"), median(late, "series")],
        "new_series": dict(Counter(name.partition("{")[0] for name in sorted(new))),
        "processes": len(states[-1]["memory_by_process"]),
    }


def churn(kit: Kit, folder: Path) -> None:
    """The proof on one base."""
    subjects = make_subjects(make_draw(kit.name), RECIPES[kit.name], draw_prompt)
    with serve(kit, folder) as server, ExitStack() as stack:
        head = {"authorization": f"Bearer {OPERATOR}"}
        http = stack.enter_context(httpx.Client(base_url=server.url, headers=head, timeout=300))
        alone = ask_alone(http, [subject.body() for subject in subjects])
        prompt = subjects[0].prompt
        profiles_alone = ask_alone(http, [replace(subject, prompt=prompt).body() for subject in subjects])
        exact = compare_with_peft(kit, subjects, alone)
        told = tell_apart(profiles_alone)
        guests = make_guests(kit)
        guests_alone = ask_guests_alone(http, guests, prompt)
        tenants = open_clients(stack, server)
        clients = Clients(tenants, subjects, alone, profiles_alone, guests, guests_alone, GUEST_FORM)
        limit = Limit()  # what is asked alone before takes a quarter of an hour on the shipped base
        states = run(clients, server, REQUESTS[kit.name], limit)
        after = ask_alone(http, [subject.body() for subject in subjects])
    changed = [s.recipe for s, one, other in zip(subjects, alone, after, strict=True) if one.differs(other)]
    figures = {
        "base": f"{kit.name}, float32",
        "recipes": len(subjects),
        "forms": len(FORMS),
        "tenants": len(TENANTS),
        **describe_clients(clients),
        "tolerance": TOLERANCE,
        "largest_difference_from_peft": exact,
        "told_apart": round(told, 4),
        "changed_afterwards": len(changed),
        "seconds": round(limit.seconds),
        **describe(states),
    }
    record(f"churn, {kit.name}", "test_churn.py", figures)
    assert not clients.wrong, clients.wrong[:5]
    assert not clients.lost, clients.lost[:5]
    assert not changed
    assert exact < TOLERANCE
    assert told > 0.95, "else a wrong answer might look like a right one"
    if clients.requests >= SETTLED:
        check_flat(figures)


def describe_clients(clients: Clients) -> dict[str, Any]:
    """What they did and got."""
    return {
        "requests": clients.requests,
        "steps": dict(clients.steps),
        "statuses": {str(status): count for status, count in sorted(clients.statuses.items())},
        "sources": dict(clients.sources),
        "compared": clients.compared,
        "wrong": len(clients.wrong),
        "lost": len(clients.lost),
    }


def compare_with_peft(kit: Kit, subjects: list[Subject], alone: list[Answer]) -> float:
    """The largest difference of the plain sums' log-probabilities from those of transformers + PEFT."""
    reference = kit.make_reference()
    worst: float = 0.0
    for subject, answer in zip(subjects, alone, strict=True):
        if subject.form in ("alone", "sum"):
            values = reference.log_probabilities([*subject.prompt, *answer.tokens], str(subject.recipe))
            worst = max(worst, *(abs(x - y) for x, y in zip(values[-TOKENS:], answer.values, strict=True)))
    return worst


def tell_apart(answers: list[Answer]) -> float:
    """The share of pairs of recipes whose answers to one prompt are seen to be of different weights."""
    pairs = list(combinations(answers, 2))
    return sum(one.differs(other) for one, other in pairs) / len(pairs)


def check_flat(figures: dict[str, Any]) -> None:
    """Fail when memory, files or series have grown."""
    assert figures["memory_growth"] <= GROWTH
    assert figures["open_files"][1] <= figures["open_files"][0] + 8
    assert figures["series"][1] <= SERIES_GROWTH * figures["series"][0]


def test_thousands_of_requests_on_a_tiny_base(tmp_path: Path) -> None:
    churn(make_tiny(tmp_path), tmp_path)


def test_requests_on_the_shipped_base(tmp_path: Path) -> None:
    churn(make_shipped(tmp_path), tmp_path)
