"""Two real replicas over one PostgreSQL and one folder or bucket: the same bytes, switches, a kill in the middle of a
build, a database that stalls and one that is stopped: `make soak`, docs/replicas.md.
"""

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, text

from benchmarks.servers import START_LIMIT_S
from tests.conftest import BASE_NAME, ROOT, family
from tests.service.buckets import BUCKET, make_bucket, run_s3, write_table
from tests.service.databases import Postgres, run_postgres
from tests.service.own import MARGIN_S, Own, wait
from tests.service.replicas import SWITCH_S
from tests.service.test_replicas import read_bytes

pytestmark = pytest.mark.soak

RESULT = ROOT / "benchmarks/results/replicas-soak.json"
SWITCHES = 20
LEASE_S = 6
BUILD_S = 60
"""A build, on a machine that has others to make."""
METHODS = ("ties({}, density=0.5)", "dare_linear({}, density=0.5, seed=7)", "svd({}, rank=8)", "knots({}, density=0.5)")


@dataclass
class Fleet:
    """Replicas, and what they share."""

    folder: Path
    postgres: Postgres
    store: dict[str, str]
    """Settings of the place."""
    place: str
    servers: list[Own] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def start(self, *, core: int, data: Path | None = None, **settings: str) -> Own:
        """Start one more, on a core of its own, and return once it is ready."""
        (own := self.folder / str(len(self.servers))).mkdir()
        server = Own(
            own,
            data=data,
            FUSION_DATABASE=self.postgres.url,
            FUSION_ADAPTERS="task=shipped:task,safety=shipped:safety",
            FUSION_LOOP_TIMEOUT_S="30",
            FUSION_WAIT_TIMEOUT_S=str(4 * BUILD_S),
            OMP_NUM_THREADS="1",
            VLLM_CPU_OMP_THREADS_BIND=str(core),
            **self.store,
            **settings,
        )
        self.servers.append(server)
        server.wait_ready(START_LIMIT_S)
        return server

    def report(self, name: str, value: Any) -> None:
        print(f"{name}: {value}", flush=True)
        self.figures[name] = value


@pytest.fixture(params=["folder", "bucket"])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    folder = Path(tempfile.mkdtemp(prefix="own"))  # short: sockets lie in it
    (folder / "s").mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        postgres = stack.enter_context(run_postgres())
        store = {"FUSION_STORE": str(folder / "s")}
        if request.param == "bucket":
            stack.enter_context(make_bucket(endpoint := stack.enter_context(run_s3())))
            store["FUSION_STORE"] = f"s3://{BUCKET}/replicas"
            store["FUSION_SOURCE_CREDENTIALS"] = str(write_table(folder, endpoint))
        fleet = Fleet(folder, postgres, store, request.param)
        try:
            yield fleet
        finally:
            for own in fleet.servers:
                kill(own)


def kill(own: Own) -> None:
    """End all processes of a server at once."""
    for pid in family(own.process.pid) if own.process.poll() is None else []:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    own.process.wait(MARGIN_S)


def put(own: Own, recipe: str) -> str:
    """Give the profile `p` this recipe; returns its digest."""
    answer = httpx.put(f"{own.url}/v1/fusions/p", json={"fusion": recipe}, timeout=300)
    return str(answer.raise_for_status().json()["digest"])


def ask(own: Own, model: str = "p") -> httpx.Response:
    body = {"model": model, "prompt": "The", "max_tokens": 1, "temperature": 0, "logprobs": 1}
    answer = httpx.post(f"{own.url}/v1/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    return answer


def switch(here: Own, there: Own, recipe: str) -> float:
    """Seconds from the change at one replica until an answer of the other has been computed with it."""
    began = time.monotonic()
    digest = put(here, recipe)
    while ask(there).headers["x-fusion-digest"] != digest:
        assert time.monotonic() - began < MARGIN_S
    return time.monotonic() - began


def test_replicas_share_everything_and_lose_nothing(fleet: Fleet) -> None:
    one, two = fleet.start(core=0), fleet.start(core=1)
    put(one, "0.6*task + 0.4*safety")
    wait(lambda: two.status("/v1/fusions/p") == 200, SWITCH_S)
    turns = [(one, two), (two, one)] * (SWITCHES // 2)
    times = sorted(switch(*turn, f"{n / SWITCHES:g}*task + 0.5*safety") for n, turn in enumerate(turns, 1))
    fleet.report("switches", SWITCHES)
    fleet.report("switch_median_s", round(times[SWITCHES // 2], 2))
    fleet.report("switch_longest_s", round(times[-1], 2))
    assert times[-1] < SWITCH_S

    make_the_same(fleet, one, two)
    survive_a_kill(fleet, one, two)
    survive_an_outage(fleet, two)
    again = fleet.start(core=0, data=one.data)
    assert ask(again).headers["x-fusion-digest"] == ask(two).headers["x-fusion-digest"]
    assert ask(again, BUILT).headers["x-fusion-source"] == "loaded"
    fleet.report("files_compared", compare_builds(again, two))
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    results |= {
        "command": "pytest -m soak tests/service/test_replica_servers.py",
        "base": f"{BASE_NAME}, float32",
    }
    results[fleet.place] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **fleet.figures}
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


BUILT = "ties(0.61*task + 0.41*safety, density=0.5)"


def compare_builds(one: Own, two: Own) -> int:
    """How many files of stacks and builds both have; they are the same to the last bit."""
    first, second = read_bytes(one.data / "builds"), read_bytes(two.data / "builds")
    both = first.keys() & second.keys()
    assert all(first[path] == second[path] for path in both)
    return len(both)


def make_the_same(fleet: Fleet, one: Own, two: Own) -> None:
    """Whoever of both is asked for a build, or both at once: one makes it, both serve it, and answer the same."""
    sources: list[list[str]] = []
    with ThreadPoolExecutor(2) as threads:
        for number, method in enumerate(METHODS):
            recipe = method.format("0.62*task + 0.42*safety")
            order = (one, two) if number % 2 else (two, one)
            if number < len(METHODS) // 2:
                answers = [ask(own, recipe) for own in order]
            else:
                answers = list(threads.map(ask, order, [recipe] * 2))
            sources.append(sorted(answer.headers["x-fusion-source"] for answer in answers))
            first, second = (answer.json()["choices"][0]["logprobs"]["token_logprobs"] for answer in answers)
            assert first == pytest.approx(second, abs=1e-4)
    assert sources == [["built", "loaded"]] * len(METHODS)
    fleet.report("builds_made_once", len(METHODS))
    assert compare_builds(one, two) >= 4 * len(METHODS)


def survive_a_kill(fleet: Fleet, one: Own, two: Own) -> None:
    """Kill one in the middle of a build that the other wants, too: it has that soon after the lease has expired."""
    engine = create_engine(fleet.postgres.url)

    def count_leases() -> int:
        with engine.connect() as connection:
            return int(connection.execute(text("SELECT count(*) FROM leases WHERE until > now()")).scalar_one())

    before = set(os.listdir(one.data / "builds"))
    with ThreadPoolExecutor(1) as thread:
        lost = thread.submit(ask, one, BUILT)
        wait(lambda: count_leases() == 1, MARGIN_S)
        kill(one)
        assert isinstance(lost.exception(MARGIN_S), httpx.HTTPError)
    left = [name for name in os.listdir(one.data / "builds") if not name.startswith(".")]
    assert set(left) == before, "nothing half-made has its name"
    began = time.monotonic()
    assert ask(two, BUILT).headers["x-fusion-source"] == "built"
    fleet.report("kill_to_answer_s", round(time.monotonic() - began, 1))
    assert time.monotonic() - began < LEASE_S + BUILD_S
    assert count_leases() == 0
    engine.dispose()


def survive_an_outage(fleet: Fleet, two: Own) -> None:
    """With a database that stalls, and one that is stopped, it answers what it knows, says so, refuses changes, and
    goes on afterwards.
    """
    known = ask(two).headers["x-fusion-digest"]
    for fault in (fleet.postgres.stalled, fleet.postgres.stopped):
        with fault():
            wait(lambda: not two.readiness()["registry"]["current"], MARGIN_S)
            assert two.readiness()["registry"]["reason"]
            assert "fusion_registry_current 0.0" in two.get("/metrics").text
            assert two.status("/readyz") == 200
            assert ask(two).headers["x-fusion-digest"] == known
            assert ask(two, f"ties(0.6{len(fault.__name__)}*task + 0.4*safety, density=0.5)")  # without a lease
            answer = httpx.put(f"{two.url}/v1/fusions/p", json={"fusion": "1*task"}, timeout=60)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert "what it said last is served" in answer.json()["error"]["message"]
        began = time.monotonic()
        wait(lambda: bool(two.readiness()["registry"]["current"]), MARGIN_S)
        fleet.report(f"{fault.__name__}_to_current_s", round(time.monotonic() - began, 1))
        assert "fusion_registry_current 1.0" in two.get("/metrics").text
        known = put(two, f"0.7*task + 0.{len(fault.__name__)}*safety")
        assert ask(two).headers["x-fusion-digest"] == known
