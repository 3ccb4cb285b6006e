"""An engine core that stalls is killed; one that dies says why."""

import asyncio
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from service.engine import core, death
from service.engine.core import Core
from service.engine.death import DeathFile, record_errors

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


class Process:
    """An engine's process."""

    def __init__(self) -> None:
        self.name, self.exitcode = "EngineCore", None
        self.killed = False

    def kill(self) -> None:
        self.killed = True


class Client:
    """vLLM's client of an engine that answers each call after a while, or never."""

    def __init__(self, answer_s: float = 0.0) -> None:
        self.errored, self.calls, self.answer_s = False, 0, answer_s
        self.process = Process()
        self.engine_core = SimpleNamespace(
            resources=SimpleNamespace(engine_manager=SimpleNamespace(processes=[self.process]))
        )

    async def is_sleeping(self) -> bool:
        self.calls += 1
        await asyncio.sleep(self.answer_s)
        return False

    def shutdown(self, timeout: float) -> None:
        time.sleep(self.answer_s)


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> DeathFile:
    monkeypatch.setenv(death.DEATH_FILE, "")
    return DeathFile()


def make_core(client: Client, file: DeathFile) -> Core:
    engine: Any = client
    return Core(engine, ThreadPoolExecutor(1), file)


async def test_an_engine_that_answers_nothing_is_killed_and_says_so(file: DeathFile) -> None:
    client = Client(answer_s=60)
    engine = make_core(client, file)
    await engine.watch(0.2)
    assert client.process.killed
    assert engine.death() == "it answered nothing for 0.2 s and was killed"


async def test_an_engine_that_answers_late_but_in_time_is_left_alone(file: DeathFile) -> None:
    client = Client(answer_s=0.2)
    watch = asyncio.create_task(make_core(client, file).watch(10.0))
    while client.calls < 2:
        assert not watch.done()
        await asyncio.sleep(0.01)
    assert not client.process.killed
    client.errored = True
    await watch
    assert not client.process.killed


async def test_an_engine_that_does_not_close_is_killed_and_not_waited_for(
    file: DeathFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "CLOSE_S", 0.1)
    client = Client(answer_s=5)
    began = time.monotonic()
    await make_core(client, file).close()
    assert time.monotonic() - began < 4
    assert client.process.killed


LOG = """
import logging
from service.engine.death import record_errors
record_errors()
log = logging.getLogger("vllm.v1")
log.warning("no error")
try:
    try:
        {}["a"]
    except KeyError as cause:
        raise RuntimeError("see above") from cause
except RuntimeError:
    log.exception("fatal")
log.error("and the core with it")
"""


async def test_a_start_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch, file: DeathFile) -> None:
    monkeypatch.setattr(core, "_make_client", lambda args: time.sleep(0.5))
    monkeypatch.setattr(core, "START_TIMEOUT_S", 0.05)
    with pytest.raises(RuntimeError, match=r"the engine could not start: it was not ready within 0.05 s"):
        await core.start_core(None)


async def test_an_engine_that_fails_its_first_call_is_stopped(monkeypatch: pytest.MonkeyPatch, file: DeathFile) -> None:
    stopped = threading.Event()

    async def reset_mm_cache() -> None:
        raise ValueError("no cache")

    client = SimpleNamespace(reset_mm_cache=reset_mm_cache, shutdown=lambda timeout: stopped.set())
    monkeypatch.setattr(core, "_make_client", lambda args: client)
    with pytest.raises(ValueError, match="no cache"):
        await core.start_core(None)
    assert await asyncio.to_thread(stopped.wait, 5)


async def test_the_first_error_of_a_burst_is_the_reason_and_its_root_is_named(file: DeathFile) -> None:
    engine = make_core(Client(), file)
    assert engine.death() == "it gave no reason; exit codes of its processes: {'EngineCore': None}"
    subprocess.run([sys.executable, "-c", LOG], check=True, capture_output=True)
    assert engine.death() == "KeyError: 'a'"
    await engine.close()
    assert file.read() == ""


async def test_errors_of_long_ago_are_no_reason_and_make_room_for_new_ones(
    file: DeathFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("vllm")
    record_errors()
    try:
        log.error("first")
        monkeypatch.setattr(death, "BURST_S", 0.0)
        time.sleep(0.01)
        log.error("second " + "long " * 1000)
        assert file.read().startswith("second long long")
        assert len(file.read()) <= death.MAX_CHARACTERS
        monkeypatch.setattr(death, "RECENT_S", 0.0)
        assert file.read() == ""
    finally:
        log.removeHandler(log.handlers[-1])
        file.delete()
