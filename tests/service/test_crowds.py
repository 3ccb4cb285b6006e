"""Crowds at the edge: tenants behind one gateway, a tenant over its limit on replicas, names that a proxy passes on."""

import asyncio
import time
from dataclasses import asdict

import pytest
from starlette.requests import Request as HttpRequest

from service import shares as shares_module
from service.audit import write_canonical
from service.callers import CALLER, Caller
from service.edge.bodies import LARGEST_BODIES, TRANSFERS, LimitBodies
from service.routes import find_actor
from tests.service.databases import Postgres
from tests.service.test_bodies import LIMIT, MULTIPART, SETTINGS, App, Request, settle
from tests.service.test_shares import count_calls, run_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


async def test_one_tenant_behind_a_gateway_leaves_uploads_and_memory_for_others() -> None:
    app = App()
    edge = LimitBodies(app, SETTINGS)

    def start(number: int, tenant: str, path: str = "/", **headers: str) -> Request:
        request = Request(path, **headers)  # all have the gateway's address
        request.scope[CALLER] = Caller(f"k{number}", "deployer", tenant)
        return request.start(edge)

    uploads = [start(number, "noisy", "/v1/adapters", **MULTIPART) for number in range(TRANSFERS)]
    await settle()
    assert [request.status for request in uploads] == [0] * (TRANSFERS - 1) + [429]
    export = start(9, "quiet", "/v1/fusions/x/export")
    await settle()
    assert export.status == 0
    bodies = [start(number, "noisy") for number in range(LARGEST_BODIES)]
    for request in bodies:
        await request.feed(bytes(LIMIT))
    assert [request.status for request in bodies].count(429) == LARGEST_BODIES // 4
    quiet = start(9, "quiet")
    await quiet.feed(bytes(LIMIT), more=False)
    app.gate.set()
    assert await quiet.end() == 200
    for request in (*uploads[:-1], export, *bodies):
        if not request.status:
            await request.feed(b"", more=False)
            assert await request.end() == 200


async def test_whoever_is_over_a_limit_costs_the_others_no_transactions(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares_module, "RENEW_S", 1000)
    with postgres.fresh() as url:
        async with run_server(url) as one, run_server(url) as other:
            assert await other.count("requests", 1, 30) == 30
            assert await one.count("requests", 1, 60) <= 60
            asked, began = count_calls(one), time.monotonic()
            attempts = [one.count("requests", 1, 1) for _ in range(300)]
            assert sum(await asyncio.gather(*attempts)) == 0
            periods = (time.monotonic() - began) / shares_module.ASK_AGAIN_S
            assert len(asked) <= 2 + periods, f"{len(asked)} transactions for 300 refused requests"


async def test_no_address_of_a_proxy_makes_a_line_longer_than_is_read_again() -> None:
    request = HttpRequest({"type": "http", "client": ("\xe9" * 60_000, 1), "headers": []})
    assert len(write_canonical(asdict(find_actor(request)))) < 1000
