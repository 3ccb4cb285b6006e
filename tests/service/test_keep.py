"""The service is kept: a dead engine is replaced while the front answers 503, and one that dies for ever ends it."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service import life, startup
from service.life import EngineLostError, keep_service
from service.metrics import Metrics
from service.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


class Service:
    """A service whose engine can die."""

    def __init__(self, number: int) -> None:
        self.engine = self
        self.alive = True
        self.number = number

    def death(self) -> str:
        return f"reason {self.number}"


class World:
    """Fakes around `keep_service`: each start, and what the front was told."""

    def __init__(self) -> None:
        self.services: list[Service] = []
        self.events: list[str] = []
        self.held = 0
        self.patient = True
        self.faults: dict[int, Exception] = {}
        self.changed = asyncio.Event()
        self.series = CollectorRegistry()

    @contextmanager
    def open_registry(self, settings: Settings) -> Iterator[Any]:
        self.held += 1
        try:
            yield SimpleNamespace(watch=partial(asyncio.sleep, 3600))
        finally:
            self.held -= 1

    @asynccontextmanager
    async def open_service(self, settings: Settings, registry: Any, metrics: Any) -> AsyncIterator[Service]:
        service = Service(len(self.services) + 1)
        self.services.append(service)
        if service.number in self.faults:
            raise self.faults[service.number]
        yield service
        self.events.append(f"closed {service.number}")

    def readiness(self) -> dict[str, Any]:
        return {"ready": bool(self.services) and self.services[-1].alive}

    @property
    def is_ready(self) -> float | None:
        """As Prometheus sees it."""
        return self.series.get_sample_value("fusion_ready")

    def start(self, service: Service) -> None:
        self.events.append(f"start {service.number}")
        self.changed.set()

    def expect(self, *, starting: bool) -> None:
        self.patient = starting

    def stop(self, state: str, reason: str) -> None:
        self.events.append(reason)

    async def die(self) -> None:
        """Kill the engine that runs, once it does."""
        await self.changed.wait()
        self.changed.clear()
        self.services[-1].alive = False


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(life, "POLL_S", 0.01)
    monkeypatch.setattr(life, "PAUSE_S", 0.05)
    monkeypatch.setattr(startup, "open_registry", world.open_registry)
    monkeypatch.setattr(startup, "open_service", world.open_service)
    monkeypatch.setattr(startup, "Metrics", lambda: Metrics(world.series))
    return world


def keep(world: Any) -> asyncio.Task[None]:
    return asyncio.create_task(keep_service(Settings(), world, world))


async def test_a_dead_engine_is_replaced_under_one_registry(world: World) -> None:
    task = keep(world)
    await world.die()
    assert world.is_ready == 0
    await world.changed.wait()
    assert world.is_ready == 1
    assert world.events == ["start 1", "closed 1", "the engine died; restarting, attempt 2 of 3", "start 2"]
    assert world.held == 1
    assert not world.patient
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert world.held == 0


async def test_an_engine_that_dies_three_times_in_a_row_ends_the_service_with_its_reason(world: World) -> None:
    task, began = keep(world), time.monotonic()
    for _ in range(3):
        await world.die()
    with pytest.raises(EngineLostError, match="died 3 times in a row: reason 3"):
        await task
    assert time.monotonic() - began > 0.05 + 0.1, "each start waits longer than the one before"
    assert [event for event in world.events if "attempt" in event] == [
        "the engine died; restarting, attempt 2 of 3",
        "the engine died; restarting, attempt 3 of 3",
    ]
    assert len(world.services) == 3


async def test_an_engine_that_lived_long_starts_the_count_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "HEALTHY_S", 0.0)
    task = keep(world)
    for _ in range(6):
        await world.die()
    await world.changed.wait()
    assert len(world.services) == 7
    assert {event for event in world.events if "attempt" in event} == {"the engine died; restarting, attempt 2 of 3"}
    task.cancel()


async def test_a_first_start_that_fails_ends_the_service_at_once(world: World) -> None:
    world.faults[1] = ValueError("no such flag")
    with pytest.raises(ValueError, match="no such flag"):
        await keep(world)
    assert len(world.services) == 1


async def test_a_later_start_that_fails_counts_as_a_death(world: World) -> None:
    world.faults[2] = RuntimeError("out of memory")
    world.faults[3] = RuntimeError("out of memory again")
    task = keep(world)
    await world.die()
    with pytest.raises(EngineLostError, match="3 times in a row: out of memory again"):
        await task
    assert world.held == 0
