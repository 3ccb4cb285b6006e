"""Fetches into a catalog over a fake engine, and the routes around them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
from fastapi import FastAPI

from service.edge.clients import Shares
from service.front import EXPECTED, answer_error
from service.limits import Limits, LimitTable
from service.routes import adapters as routes
from service.sources.addresses import read_networks
from service.sources.fetch import Sources
from service.sources.fetches import Fetches, Order
from service.sources.locations import AllowList
from service.threads import Threads
from tests.service.shops import Shop

LOOPBACK = ("127.0.0.0/8",)


@asynccontextmanager
async def fetching(
    shop: Shop,
    *allowed: str,
    credentials: str = "",
    networks: tuple[str, ...] = LOOPBACK,
    **changes: Any,
) -> AsyncIterator[Fetches]:
    """Fetches from these places, with these tables of credentials."""
    file = shop.catalog.settings.data / "credentials.toml"
    file.write_text(credentials)
    bounds = {"timeout_s": 1.0, "max_bytes": 2**22, "pause_s": 0.01, **changes}
    sources = Sources(AllowList(allowed), read_networks(networks), str(file), **bounds)
    fetches = Fetches(sources, shop.catalog, max_fetches=4)
    try:
        yield fetches
    finally:
        await fetches.close()


async def fetch(fetches: Fetches, source: str, name: str = "wide", **options: Any) -> str:
    """The digest of what was registered; `ApiError` says why it was not."""
    record, _ = await fetches.start(Order(name, source, "client", **options)).wait()
    return record.digest


@asynccontextmanager
async def routed(shop: Shop, fetches: Fetches) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the routes of adapters."""
    threads = Threads.start(waiting=9, wait_timeout_s=9)
    app = FastAPI(redirect_slashes=False)
    app.include_router(routes.router)
    catalog = shop.catalog
    app.state.service = SimpleNamespace(
        catalog=catalog,
        fetches=fetches,
        settings=catalog.settings,
        registry=catalog.registry,
        names=catalog.names,
        engine=SimpleNamespace(),
        materializer=SimpleNamespace(damage={}),
        threads=threads,
        limits=Limits(LimitTable(), catalog.registry.ledger, shop.profiles.metrics),
    )
    app.state.shares = Shares(9)
    for kind in EXPECTED:
        app.add_exception_handler(kind, answer_error)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        yield client
    threads.close()
