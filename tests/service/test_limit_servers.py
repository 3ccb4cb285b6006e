"""A limit over two real replicas under load, one of which is killed: `make soak`, docs/limits.md."""

import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from service.ledger import WINDOW_S
from service.shares import LEASE_S
from tests.service.databases import run_postgres
from tests.service.own import Own
from tests.service.test_replica_servers import Fleet, kill

pytestmark = pytest.mark.soak
TOKENS, REQUESTS, CONCURRENT = 600, 120, 6
POLICY = f'[limits.tenants.""]\ntokens = {TOKENS}\nrequests = {REQUESTS}\nconcurrent = {CONCURRENT}\n'
CLIENTS, BOTH_S, ALONE_S = 6, 70, 2 * WINDOW_S + 40
KEPT_S = LEASE_S + WINDOW_S + 1
"""How long the share of a replica that was killed is missing for the others."""


@dataclass(frozen=True)
class Answer:
    """What came of a request, and when that was on the way (seconds)."""

    began: float
    ended: float
    tokens: int


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    folder = Path(tempfile.mkdtemp(prefix="own"))  # short: sockets lie in it
    (folder / "s").mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        fleet = Fleet(folder, stack.enter_context(run_postgres()), {"FUSION_STORE": str(folder / "s")}, "folder")
        try:
            yield fleet
        finally:
            for own in fleet.servers:
                kill(own)


def load(own: Own, end: threading.Event, answers: list[Answer], refused: list[int]) -> None:
    """Ask without a pause until the end, as one of several clients."""
    with httpx.Client(base_url=own.url, timeout=120) as http:
        while not end.is_set():
            body = {"model": "0.5*task", "prompt": "one two " * random.randint(1, 9), "ignore_eos": True}
            began = time.monotonic()
            try:
                answer = http.post("/v1/completions", json=body | {"max_tokens": random.randint(1, 12)})
            except httpx.TransportError:  # the replica was killed
                return
            if answer.status_code == 200:
                answers.append(Answer(began, time.monotonic(), answer.json()["usage"]["total_tokens"]))
            else:
                assert answer.status_code == 429, answer.text
                assert int(answer.headers["retry-after"]) > 0
                refused.append(answer.status_code)
                time.sleep(0.2)


def find_most(answers: list[Answer], since: float = 0.0) -> tuple[int, int]:
    """The most tokens, and answers, that lie wholly within 60 seconds, of those that begin after `since`."""
    within = [
        [other for other in answers if other.began >= one.began and other.ended <= one.began + WINDOW_S]
        for one in answers
        if one.began >= since
    ]
    return max(sum(a.tokens for a in part) for part in within), max(map(len, within))


def test_two_replicas_use_no_more_than_a_limit_and_one_gets_what_the_other_leaves(fleet: Fleet) -> None:
    policy = fleet.folder / "policy.toml"
    policy.write_text(POLICY)
    cores = sorted(os.sched_getaffinity(0))
    one, two = (fleet.start(core=core, FUSION_POLICY=str(policy)) for core in (cores[0], cores[-1]))
    end, answers, refused = threading.Event(), list[Answer](), list[int]()
    with ThreadPoolExecutor(2 * CLIENTS) as threads:
        running = [threads.submit(load, own, end, answers, refused) for own in (one, two) for _ in range(CLIENTS)]
        time.sleep(BOTH_S)
        kill(one)
        killed = time.monotonic()
        time.sleep(ALONE_S)
        end.set()
    for task in running:
        task.result()
    for most, limit, part in zip(find_most(answers), (TOKENS, REQUESTS), ("tokens", "requests"), strict=True):
        fleet.report(f"most_{part}", most)
        assert most <= limit
    fleet.report("refused", len(refused))
    assert refused
    later = find_most(answers, killed + KEPT_S)
    fleet.report("alone_later", later)
    assert later[0] > TOKENS / 2 or later[1] > REQUESTS / 2, "the share of the one that was killed has come back"
