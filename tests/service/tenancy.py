"""The service's app over a fake engine, asked by callers of several tenants."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.types import Receive, Scope, Send

from service.callers import CALLER, Caller
from service.exports import Exports
from service.front import build_app
from service.pins import Pins
from service.scorecards import Scorecards
from service.sources.addresses import read_networks
from service.sources.fetch import Sources
from service.sources.fetches import Fetches
from service.sources.locations import AllowList
from tests.service.conftest import make_service
from tests.service.shops import Shop, open_shop

ACME, GLOBEX = "acme", "globex"
SYSTEM = "Only those who may edit see this."
WHO = "x-test-caller"
"""A header with role and tenant, in the place of an API key."""
PATHS = ("/v1/chat/completions", "/v1/chat/completions/render", "/v1/completions", "/v1/responses", "/v1/messages")


@dataclass
class Tenancy:
    """The app, and clients of it."""

    shop: Shop
    app: FastAPI
    service: Any

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app, as it is behind an edge that has found the caller."""
        role, _, tenant = dict(scope["headers"]).get(WHO.encode(), b"admin:").decode().partition(":")
        caller = Caller(key=f"key-of-{tenant}", role=role, tenant=tenant)  # type: ignore[arg-type]  # one of them
        await self.app({**scope, CALLER: caller}, receive, send)

    def client(self, tenant: str = "", role: str = "admin") -> httpx.AsyncClient:
        headers = {WHO: f"{role}:{tenant}"}
        transport = httpx.ASGITransport(self)  # type: ignore[arg-type]  # its own types
        return httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers)


def make_vllm() -> FastAPI:
    """Answers with what reaches it."""
    app = FastAPI()

    async def answer(request: Request) -> dict[str, Any]:
        return {"got": json.loads(await request.body())}

    for path in PATHS:
        app.add_api_route(path, answer, methods=["POST"])
    return app


@asynccontextmanager
async def open_tenancy(folder: Path, **settings: Any) -> AsyncIterator[Tenancy]:
    """An app without adapters; those of the shop's root can be registered."""
    folder.mkdir(parents=True, exist_ok=True)
    async with open_shop(folder, **settings) as shop:
        catalog, profiles = shop.catalog, shop.profiles
        service = make_service(catalog.registry, catalog.names, catalog.settings)
        service.engine.app = make_vllm()
        sources = Sources(AllowList(()), read_networks(()), "", timeout_s=1.0, max_bytes=2**22, pause_s=0.01)
        service.catalog, service.profiles, service.pool, service.files = catalog, profiles, catalog.pool, catalog.files
        service.threads, service.materializer, service.metrics = shop.threads, shop.materializer, profiles.metrics
        service.scorecards = Scorecards(catalog.settings, catalog.registry, catalog.write_lock)
        service.pins = Pins(
            catalog.registry, catalog.names, catalog.pool, profiles.policy, catalog.write_lock, places=4, timeout_s=5
        )
        catalog.pool.keep_pinned(service.pins.list_keys)
        service.exports = Exports(folder, shop.materializer, catalog.files, shop.threads)
        service.fetches = Fetches(sources, catalog, max_fetches=4)
        yield Tenancy(shop, build_app(service), service)
        await service.fetches.close()


async def stock(tenancy: Tenancy) -> None:
    """Public are the adapter `wide` and the profile `plain`; two tenants have an adapter and a profile of one name."""
    for tenant, name, folder in (("", "wide", "wide"), (ACME, "own", "narrow"), (GLOBEX, "own", "third")):
        await add(tenancy, tenant, name, folder)
    await put(tenancy, "", "plain", "0.5*wide")
    await put(tenancy, ACME, "both", "0.25*own + 0.5*wide", {"system": SYSTEM, "temperature": 0.5})
    await put(tenancy, GLOBEX, "both", "0.75*own")


@pytest.fixture
async def stocked(tmp_path: Path) -> AsyncIterator[Tenancy]:
    """An app with what `stock` puts there."""
    async with open_tenancy(tmp_path) as tenancy:
        await stock(tenancy)
        yield tenancy


async def add(tenancy: Tenancy, tenant: str, name: str, folder: str, **options: Any) -> httpx.Response:
    body = {"name": name, "path": str(tenancy.shop.root / folder), **options.pop("body", {})}
    return await tenancy.client(tenant, "deployer").post("/v1/adapters", json=body, **options)


async def put(
    tenancy: Tenancy, tenant: str, name: str, fusion: str, defaults: Any = None, **options: Any
) -> httpx.Response:
    body = {"fusion": fusion, "defaults": defaults, "description": f"of {tenant or 'all'}"}
    return await tenancy.client(tenant, "deployer").put(f"/v1/fusions/{name}", json=body, **options)


async def ask(tenancy: Tenancy, tenant: str, model: str, **keys: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], **keys}
    return await tenancy.client(tenant, "user").post("/v1/chat/completions", json=body)
