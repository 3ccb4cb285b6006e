"""Checks of connections by themselves, at rates and with faults that sockets do not have on demand."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from service.edge.connections import SWEEP_S, Connections
from service.edge.protocol import MIN_RATE, MIN_TRANSFER_RATE, BoundedProtocol
from tests.service.edges import LIMITS


@pytest.mark.parametrize(
    ("path", "rate", "expected"),
    [
        ("/", MIN_RATE // 2, True),
        ("/", 2 * MIN_RATE, False),
        ("/v1/fusions/x/export", MIN_TRANSFER_RATE // 2, True),
        ("/v1/fusions/x/export", 2 * MIN_TRANSFER_RATE, False),
    ],
)
def test_a_client_must_read_at_the_least_rate(path: str, rate: int, expected: bool) -> None:
    unread = 2**24
    protocol: Any = SimpleNamespace(
        table=SimpleNamespace(limits=LIMITS),
        transport=SimpleNamespace(get_write_buffer_size=lambda: unread, is_closing=lambda: False),
        answer_transport=SimpleNamespace(written=unread),
        running=SimpleNamespace(scope={"method": "GET", "path": path, "headers": []}),
        is_paused=True,
        has_unread=False,
        read_window=(0.0, 0),
    )
    stuck = []
    for tenths in range(1, 40):
        unread -= rate // 10
        stuck.append(BoundedProtocol._is_stuck(protocol, tenths / 10))  # noqa: SLF001 - as `check` calls it
    assert any(stuck) == expected


@pytest.mark.anyio
async def test_one_connection_that_fails_its_check_does_not_keep_the_others_from_theirs() -> None:
    aborted: list[str] = []

    class Failing:
        def __init__(self, network: str) -> None:
            self.network, self.loop = network, asyncio.get_running_loop()
            self.transport: Any = SimpleNamespace(abort=lambda: aborted.append(network))

        def check(self, now: float) -> None:
            raise ZeroDivisionError

        def refuse(self, error: Exception) -> None:
            raise error

    table = Connections(lambda: LIMITS)
    for network in ("one", "other"):
        table.add(Failing(network))
    await asyncio.sleep(SWEEP_S + 0.5)
    assert sorted(aborted) == ["one", "other"]
