"""Dry runs come after the cheap checks, and few of them run at once."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from adapters import RecipeError
from service.callers import Caller
from service.client_turns import LIMIT, ClientTurns
from service.conditions import UNCONDITIONAL
from service.errors import ApiError
from service.limits import Limits, LimitTable
from service.routes.fusions import put_profile
from service.routes.schemas import ProfileBody
from tests.service.conftest import World
from tests.service.shops import Shop
from tests.service.test_catalog import shop  # noqa: F401 - a fixture

SHARE = 3 * LIMIT // 4
pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


async def test_one_client_s_dry_runs_leave_turns_for_others() -> None:
    turns, running, most = ClientTurns("the checks", 5), 0, 0
    ended = asyncio.Event()

    async def run(client: str) -> None:
        nonlocal running, most
        async with turns.hold(client):
            running, most = running + 1, max(most, running + 1)
            await ended.wait()
            running -= 1

    greedy = [asyncio.create_task(run("greedy")) for _ in range(50)]
    await asyncio.sleep(0.01)
    assert running == SHARE
    others = [asyncio.create_task(run(f"client {i}")) for i in range(50)]
    await asyncio.sleep(0.01)
    assert running == most == LIMIT
    ended.set()
    await asyncio.gather(*greedy, *others)
    assert most == LIMIT
    assert not turns._lines  # noqa: SLF001 - nothing stays of a client


async def test_a_dry_run_that_gets_no_turn_in_time_is_a_503() -> None:
    turns = ClientTurns("the checks", 0.05)

    async def run() -> None:
        async with turns.hold("one"):
            await asyncio.sleep(0.5)

    busy = [asyncio.create_task(run()) for _ in range(SHARE)]
    await asyncio.sleep(0.01)
    with pytest.raises(ApiError, match="waiting for the checks of this client") as caught:
        await run()
    assert caught.value.status == 503
    await asyncio.gather(*busy)


async def test_what_has_no_room_is_refused_before_it_is_checked(world: Callable[..., World]) -> None:
    w = world(client_places=1)

    async def check() -> None:
        raise AssertionError("a dry run")

    async with w.pool.lease(w.fusion("1*a"), client="one"):
        with pytest.raises(ApiError, match="FUSION_MAX_CLIENT_PLACES") as caught:
            await w.pool.acquire(w.fusion("1*b"), client="one", check=check)
        assert caught.value.status == 429


async def test_a_full_queue_is_said_before_the_check(world: Callable[..., World]) -> None:
    w = world(max_waiting=1)
    w.engine.wait = asyncio.Event()
    waiting = asyncio.create_task(w.pool.acquire(w.fusion("1*a")))
    await asyncio.sleep(0.05)

    async def check() -> None:
        raise AssertionError("a dry run")

    with pytest.raises(ApiError, match="FUSION_MAX_WAITING"):
        await w.pool.acquire(w.fusion("1*b"), client="one", check=check)
    w.engine.wait.set()
    w.pool.release(await waiting)


async def test_a_profile_s_name_recipe_and_size_come_before_its_dry_runs(shop: Shop) -> None:  # noqa: F811 - a fixture
    await shop.catalog.add("wide", shop.root / "wide")
    asked: list[str] = []

    async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(scope["path"])
        await PlainTextResponse("fine")(scope, receive, send)

    engine = SimpleNamespace(app=vllm)
    profiles = replace(shop.profiles, settings=replace(shop.profiles.settings, registry_bytes=4000))
    service: Any = SimpleNamespace(engine=engine, profiles=profiles, pool=profiles.pool, registry=profiles.registry)
    service.limits = Limits(LimitTable(), profiles.registry.ledger, profiles.metrics)

    async def put(name: str, fusion: str, **more: Any) -> None:
        body = ProfileBody.model_validate({"fusion": fusion, "defaults": {"max_tokens": 5}, **more})
        await put_profile(name, body, service, "one", "", Caller(), UNCONDITIONAL, Response())

    for name, fusion, more in (
        ("a@2", "1*wide", {}),
        ("wide", "1*wide", {}),
        ("even", "1*nothing", {}),
        ("even", "1*wide", {"description": "x" * 4000}),
    ):
        with pytest.raises((ApiError, RecipeError)):
            await put(name, fusion, **more)
    assert not asked
    await put("even", "1*wide")
    assert asked
