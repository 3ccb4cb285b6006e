"""Two real replicas over one PostgreSQL and one folder: switches, a kill in the middle of a build, a dead database."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine, text

from benchmarks.servers import START_LIMIT_S
from tests.conftest import family
from tests.service.conftest import Postgres
from tests.service.own import MARGIN_S, Own, wait
from tests.service.test_replicas import SWITCH_S, read_bytes

pytestmark = pytest.mark.soak

SWITCHES = 20
LEASE_S = 6
BUILD_S = 60
"""A build, on a machine that has others to make."""


def start(folder: Path, name: str, core: int, url: str) -> Own:
    (folder / name).mkdir()
    return Own(
        folder / name,
        FUSION_DATABASE=url,
        FUSION_STORE=str(folder / "shared"),
        FUSION_ADAPTERS="task=shipped:task,safety=shipped:safety",
        FUSION_LOOP_TIMEOUT_S="30",
        OMP_NUM_THREADS="1",
        VLLM_CPU_OMP_THREADS_BIND=str(core),
    )


def kill(own: Own) -> None:
    """End all processes of a server at once."""
    for pid in family(own.process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    own.process.wait(MARGIN_S)


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    with postgres.fresh() as fresh:
        yield fresh


def put(own: Own, recipe: str) -> str:
    """Give the profile `p` this recipe; returns its digest."""
    answer = httpx.put(f"{own.url}/v1/fusions/p", json={"fusion": recipe}, timeout=300)
    return str(answer.raise_for_status().json()["digest"])


def ask(own: Own, model: str = "p") -> httpx.Response:
    body = {"model": model, "prompt": "The", "max_tokens": 1, "temperature": 0}
    return httpx.post(f"{own.url}/v1/completions", json=body, timeout=300).raise_for_status()


def switch(here: Own, there: Own, recipe: str) -> float:
    """Seconds from the change at one replica until an answer of the other has been computed with it."""
    began = time.monotonic()
    digest = put(here, recipe)
    while ask(there).headers["x-fusion-digest"] != digest:
        assert time.monotonic() - began < MARGIN_S
    return time.monotonic() - began


def test_two_replicas_share_everything_and_lose_nothing(postgres: Postgres, url: str) -> None:
    tmp_path = Path(tempfile.mkdtemp(prefix="own"))  # short: sockets lie in it
    servers: list[Own] = []
    try:
        for core, name in enumerate(("1", "2")):
            servers.append(start(tmp_path, name, core, url))
            servers[-1].wait_ready(START_LIMIT_S)
        one, two = servers
        put(one, "0.6*task + 0.4*safety")
        turns = [(one, two), (two, one)] * (SWITCHES // 2)
        times = [switch(*turn, f"{n / SWITCHES:g}*task + 0.5*safety") for n, turn in enumerate(turns, 1)]
        print(f"seconds from a switch to the other's answer: {sorted(times)}")
        assert max(times) < SWITCH_S

        survive_a_kill(tmp_path, url, one, two)
        survive_an_outage(postgres, two)
        again = Own(
            make_folder(tmp_path / "3"), data=one.data, FUSION_DATABASE=url, FUSION_STORE=str(tmp_path / "shared")
        )
        servers.append(again)
        again.wait_ready(START_LIMIT_S)
        assert ask(again).headers["x-fusion-digest"] == ask(two).headers["x-fusion-digest"]
        assert ask(again, BUILT).headers["x-fusion-source"] == "loaded"
        shared = read_bytes(tmp_path / "shared/builds")
        for own in (again, two):
            mine = read_bytes(own.data / "builds")
            assert all(shared[path] == digest for path, digest in mine.items() if path in shared)
    finally:
        for own in servers:
            kill(own)
        shutil.rmtree(tmp_path, ignore_errors=True)


BUILT = "ties(0.61*task + 0.41*safety, density=0.5)"


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def survive_a_kill(folder: Path, url: str, one: Own, two: Own) -> None:
    """Kill one in the middle of a build that the other wants, too: it has that soon after the lease has expired."""
    engine = create_engine(url)

    def count_leases() -> int:
        with engine.connect() as connection:
            return int(connection.execute(text("SELECT count(*) FROM leases")).scalar_one())

    before = set(os.listdir(folder / "shared/builds"))
    with ThreadPoolExecutor(1) as thread:
        lost = thread.submit(ask, one, BUILT)
        wait(lambda: count_leases() == 1, MARGIN_S)
        kill(one)
        assert isinstance(lost.exception(MARGIN_S), httpx.HTTPError)
    assert set(os.listdir(folder / "shared/builds")) == before
    began = time.monotonic()
    answer = ask(two, BUILT)
    assert answer.headers["x-fusion-source"] == "built"
    print(f"seconds from the kill to the other's answer: {time.monotonic() - began:.1f}")
    assert time.monotonic() - began < LEASE_S + BUILD_S
    assert count_leases() == 0
    engine.dispose()


def survive_an_outage(postgres: Postgres, two: Own) -> None:
    """Without a database it answers what it knows, says so, refuses changes, and goes on afterwards."""
    with postgres.stalled():
        wait(lambda: not two.readiness()["registry"]["current"], MARGIN_S)
        assert "fusion_registry_current 0.0" in two.get("/metrics").text
        assert two.status("/readyz") == 200
        ask(two)
        answer = httpx.put(f"{two.url}/v1/fusions/p", json={"fusion": "1*task"}, timeout=60)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "what it said last is served" in answer.json()["error"]["message"]
    wait(lambda: bool(two.readiness()["registry"]["current"]), MARGIN_S)
    assert "fusion_registry_current 1.0" in two.get("/metrics").text
    put(two, "0.7*task + 0.3*safety")
