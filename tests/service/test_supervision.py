"""BentoML's real processes over a stub of the engine: frozen and killed ones are replaced, or all of them end."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import family, stop
from tests.service import stub
from tests.service.own import LOOP_TIMEOUT_S, MARGIN_S, STOP_TIMEOUT_S, Own, wait

Start = Callable[..., Own]
ALONE = ("-m", "bentoml", "serve", "service.bento.app:LoraFusion", "--host", "127.0.0.1", "--port", "{port}")


@pytest.fixture
def start() -> Iterator[Start]:
    folder = Path(tempfile.mkdtemp(prefix="own"))
    servers: list[Own] = []

    def start(site: str = "", **settings: Any) -> Own:
        servers.append(Own(folder, site=stub.INSTALL + site, **settings))
        return servers[0]

    yield start
    for server in servers:
        stop(server.process)
    shutil.rmtree(folder, ignore_errors=True)


def wait_for_another_worker(own: Own, worker: int) -> None:
    wait(lambda: not family(worker), 2 * LOOP_TIMEOUT_S + MARGIN_S)
    own.wait_ready(2 * MARGIN_S)
    assert own.worker != worker


def test_a_frozen_worker_is_replaced_and_a_frozen_server_ends_on_term(start: Start) -> None:
    own = start()
    own.wait_ready()
    first = own.worker
    with pytest.raises(httpx.RemoteProtocolError):  # a client that holds the interpreter is cut off
        own.get("/freeze", timeout=2 * LOOP_TIMEOUT_S + MARGIN_S)
    wait_for_another_worker(own, first)
    assert "stub.py" in own.log.read_text(), "the log shows where the loop stood"
    second = own.worker
    os.kill(second, signal.SIGSTOP)
    wait_for_another_worker(own, second)
    os.kill(own.worker, signal.SIGSTOP)
    began = time.monotonic()
    own.process.terminate()
    own.process.wait(60)
    assert time.monotonic() - began < STOP_TIMEOUT_S + MARGIN_S
    own.assert_gone()
    assert not list(own.scratch.iterdir())


CLOCK = """
import os, time
read_clock = time.time
time.time = lambda: read_clock() - 3600 * os.path.exists(os.environ["FUSION_DATA"] + "/set-back")
"""


def test_a_dead_worker_is_replaced_after_the_clock_was_set_back(start: Start) -> None:
    own = start(CLOCK)
    own.wait_ready()
    first = own.worker
    (own.data / "set-back").touch()
    time.sleep(3)  # the supervisor has set its next timer by now
    os.kill(first, signal.SIGKILL)
    wait_for_another_worker(own, first)


STUCK = """
import sys
if "serve" in sys.argv:
    import circus.watcher
    from service import pulse
    pulse.REPLACE_S = 3.0
    spawn = circus.watcher.Watcher.spawn_processes
    def spawn_once(self):
        if self.hooks.pop("fresh", True):
            self.hooks["fresh"] = None
            return spawn(self)
        import asyncio
        return asyncio.get_event_loop().create_future()
    circus.watcher.Watcher.spawn_processes = spawn_once
"""


def test_a_supervisor_that_starts_no_other_worker_ends_with_the_reason(start: Start) -> None:
    own = start(STUCK)
    own.wait_ready()
    os.kill(own.worker, signal.SIGKILL)
    assert "the worker died, and no other was started within" in own.error()
    own.assert_gone()


@pytest.mark.parametrize("victim", ["bentoml", "first"])
def test_a_killed_parent_takes_its_frozen_worker_with_it(victim: str, start: Start) -> None:
    own = start()
    own.wait_ready()
    supervisor = next(pid for pid in family(own.process.pid) if pid != own.process.pid)
    os.kill(own.core, signal.SIGSTOP)
    os.kill(own.worker, signal.SIGSTOP)
    os.kill(own.process.pid if victim == "first" else supervisor, signal.SIGKILL)
    assert own.process.wait(MARGIN_S) != 0
    own.assert_gone()


def test_on_term_health_says_no_while_requests_are_still_answered(start: Start) -> None:
    own = start(FUSION_DRAIN_S="4")
    own.wait_ready()
    with httpx.Client(base_url=own.url) as kept:
        assert "connection" not in kept.get("/v1/models").headers
        began = time.monotonic()
        own.process.terminate()
        wait(lambda: own.status("/health") == 503, MARGIN_S)
        assert own.status("/ping") == 503
        assert own.readiness()["state"] == "draining"
        assert own.status("/livez") == 200
        answers = [kept.get("/v1/models"), own.get("/v1/models")]
        assert time.monotonic() - began < 4, "this machine is too slow to tell"
    assert [answer.status_code for answer in answers] == [200, 200]
    assert {answer.headers["connection"] for answer in answers} == {"close"}
    assert own.process.wait(4 + STOP_TIMEOUT_S + MARGIN_S) == 0
    assert time.monotonic() - began >= 4
    own.assert_gone()


def test_a_frozen_supervisor_does_not_keep_the_server_from_ending(start: Start) -> None:
    own = start()
    own.wait_ready()
    os.kill(next(pid for pid in family(own.process.pid) if pid != own.process.pid), signal.SIGSTOP)
    own.process.terminate()
    assert own.process.wait(STOP_TIMEOUT_S + 5 + MARGIN_S) == 1
    own.assert_gone()
    assert not list(own.scratch.iterdir())


def test_bentoml_s_own_command_ends_with_a_frozen_worker_too(start: Start) -> None:
    own = start(command=ALONE)
    own.wait_ready()
    os.kill(own.worker, signal.SIGSTOP)
    own.process.terminate()
    assert own.process.wait(STOP_TIMEOUT_S + MARGIN_S) == 0
    own.assert_gone()


def test_an_engine_that_dies_three_times_in_a_row_ends_the_server_with_the_reason(start: Start) -> None:
    own = start()
    for _ in range(3):
        own.wait_ready()
        worker, core = own.worker, own.core
        os.kill(core, signal.SIGKILL)
        wait(lambda core=core: own.core != core or own.process.poll() is not None, MARGIN_S)  # type: ignore[misc]  # bound now
        assert own.process.poll() is not None or own.worker == worker
    assert own.error() == ("error: the service could not run: the engine died 3 times in a row: the stub ended with -9")
    own.assert_gone()


def test_a_worker_that_dies_whenever_it_starts_ends_the_server(start: Start) -> None:
    own = start(FUSION_BASE_NAME="crashes")
    assert "the worker died 3 times before it was ready" in own.error()
    own.assert_gone()
    assert not list(own.scratch.iterdir())


def test_a_start_that_fails_ends_the_server_at_once(start: Start) -> None:
    own = start(FUSION_BASE_NAME="fails")
    assert own.error() == "error: the service could not run: no such base"
    own.assert_gone()
