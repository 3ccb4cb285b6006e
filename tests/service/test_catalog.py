"""The catalog and profiles over a fake engine: what is registered, what is refused, what is left behind."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from adapters import AdapterError, LoraAdapter, load, save
from adapters.files.shipped import CHECKOUT
from service.audit import read_entries
from service.edge.clients import Shares
from service.errors import ApiError
from service.front import answer_error
from service.ledger import Ledger
from service.limits import Limits, LimitTable
from service.metrics import Metrics
from service.routes import adapters as routes
from service.settings import Settings
from service.startup import delete_orphans
from service.threads import Threads
from tests.adapters import samples
from tests.service.shops import Shop, open_shop

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    async with open_shop(tmp_path, max_names=3) as shop:
        yield shop


async def test_an_adapter_is_registered_once_under_its_name(shop: Shop) -> None:
    record, new = await shop.catalog.add("wide", shop.root / "wide")
    assert (new, record.rank, record.info["effect"]) == (True, 3, 1.0)
    assert await shop.catalog.add("wide", shop.root / "wide") == (record, False)
    with pytest.raises(ApiError, match="'wide' is already an adapter"):
        await shop.catalog.add("wide", shop.root / "narrow")


async def test_an_adapter_without_effect_is_refused_and_leaves_no_files(shop: Shop) -> None:
    shop.engine.effect, shop.engine.noise = 0.1, 0.05
    with pytest.raises(AdapterError, match="the adapter has no effect: probe log-probabilities moved by"):
        await shop.catalog.add("wide", shop.root / "wide")
    assert not shop.catalog.registry.adapters
    assert not shop.sources.entries()


async def test_the_base_is_run_once_for_each_adapter_and_again_when_it_has_moved(shop: Shop) -> None:
    counts = []
    for name, base in (("wide", 0.0), ("narrow", 0.0), ("third", 0.5)):
        shop.engine.base = base
        record, _ = await shop.catalog.add(name, shop.root / name)
        counts.append((shop.engine.probes, record.info["effect"]))
    assert counts == [(3, 1.0), (5, 1.0), (9, 0.5)]


async def test_what_this_server_cannot_serve_is_refused(shop: Shop) -> None:
    with pytest.raises(ApiError, match="rank 9 is over FUSION_MAX_LORA_RANK=8"):
        await shop.catalog.add("large", shop.root / "large")
    for name in ("wide", "narrow", "third"):
        await shop.catalog.add(name, shop.root / name)
    with pytest.raises(ApiError, match="already 3 adapters, the limit"):
        await shop.catalog.add("fourth", shop.root / "fourth")


async def test_a_pinned_adapter_stays_until_its_profiles_go(shop: Shop) -> None:
    await shop.catalog.add("wide", shop.root / "wide")
    await shop.profiles.put("even", "0.5*wide")
    with pytest.raises(ApiError, match="'wide' is used by even"):
        await shop.catalog.remove("wide")
    await shop.profiles.remove("even")
    await shop.catalog.remove("wide")
    assert not shop.sources.entries()
    with pytest.raises(ApiError, match="There is no adapter 'wide'"):
        await shop.catalog.remove("wide")


async def test_an_answer_only_adapter_is_another_than_the_same_weights_everywhere(shop: Shop) -> None:
    save(replace(samples.adapter(0, 3), answer_only=True), shop.root / "answering")
    wide, _ = await shop.catalog.add("wide", shop.root / "wide")
    answering, _ = await shop.catalog.add("answering", shop.root / "answering")
    told, _ = await shop.catalog.add("told", shop.root / "answering", answer_only=False)
    assert (answering.answer_only, told.answer_only) == (True, False)
    assert answering.digest != wide.digest == told.digest
    assert shop.catalog.names.look_up("answering").digest == answering.info["fusion_digest"]  # type: ignore[union-attr]  # not the base
    with pytest.raises(ApiError, match="expected 'answer\\(answering\\)'"):
        await shop.profiles.put("profile", "1*answering")
    assert (await shop.catalog.files.read(partial(load, shop.sources.get(answering.digest) / "adapter"))).answer_only  # type: ignore[operator]  # it is there


async def test_two_names_share_one_adapter_s_files(shop: Shop) -> None:
    for name in ("one", "other"):
        await shop.catalog.add(name, shop.root / "wide")
    assert len(shop.sources.entries()) == 1
    await shop.catalog.remove("one")
    assert shop.catalog.names.look_up("other") is not None
    assert len(shop.sources.entries()) == 1


async def read_actions(shop: Shop) -> list[str]:
    """What the audit says was done, oldest first."""
    rows = await shop.catalog.registry.transact(partial(read_entries, after=0, limit=99))
    return [row.to_dict()["entry"]["action"] for row in rows]


async def test_a_profile_gets_versions_and_rolls_back(shop: Shop) -> None:
    await shop.catalog.add("wide", shop.root / "wide")
    first, new = await shop.profiles.put("even", "1*wide", defaults={"max_tokens": 2}, description="plain")
    second, newer = await shop.profiles.put("even", "-1*wide")
    assert (first.version, new, second.version, newer) == (1, True, 2, False)
    assert await shop.profiles.rollback("even", 1) == first
    changes = await read_actions(shop)
    assert await shop.profiles.rollback("even", 1) == first
    assert changes[-1] == "profile.rollback"
    assert await read_actions(shop) == changes, "nothing has changed"
    with pytest.raises(ApiError, match="has no version '3'; it has 1, 2"):
        await shop.profiles.rollback("even", 3)
    for name, words in (("wide", "is already an adapter"), (samples.BASE, "is already the base model")):
        with pytest.raises(ApiError, match=words):
            await shop.profiles.put(name, "1*wide")
    for fusion in ("even", samples.BASE):
        with pytest.raises(ApiError, match="must be a recipe over adapters"):
            await shop.profiles.put("other", fusion)


async def test_paths_are_allowed_inside_the_roots_and_for_what_ships(shop: Shop, tmp_path: Path) -> None:
    assert shop.catalog.resolve_path(str(shop.root / "wide")) == shop.root / "wide"
    assert shop.catalog.resolve_path("shipped:task") == CHECKOUT / "task"
    (shop.root / "link").symlink_to(tmp_path / "adapters")
    for path in (str(tmp_path), str(shop.root / "link"), "/etc", "", "no/such", "wide\0"):
        with pytest.raises(ApiError) as caught:
            shop.catalog.resolve_path(path)
        assert caught.value.status == 400
    with pytest.raises(AdapterError, match="expected one of shipped:risk, shipped:safety, shipped:task"):
        shop.catalog.resolve_path("shipped:../task")


@pytest.mark.parametrize("kind", ["multipart/form-data", "Multipart/Form-Data"])
async def test_an_upload_may_come_in_chunks_of_unknown_number(kind: str) -> None:
    app = FastAPI()
    app.include_router(routes.router)
    names: list[str] = []

    async def add_read(name: str, read: object, **options: object) -> None:
        names.append(name)
        raise ApiError(409, "as far as this test goes")

    limits = Limits(LimitTable(), Ledger(), Metrics(CollectorRegistry()))
    app.state.service = SimpleNamespace(catalog=SimpleNamespace(add_read=add_read), settings=Settings(), limits=limits)
    app.state.shares = Shares(9)
    app.add_exception_handler(ApiError, answer_error)
    body = b'--x\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\nwide\r\n'
    parts = [body % (b"name", b""), body % (b"file", b'; filename="a.tar"'), b"--x--\r\n"]

    async def send_parts() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
        answer = await http.post("/v1/adapters", content=send_parts(), headers={"content-type": f"{kind}; boundary=x"})
    assert (answer.status_code, names) == (409, ["wide"]), answer.text


async def test_a_client_s_registrations_keep_no_other_client_out(shop: Shop) -> None:
    stalled, wide = threading.Event(), partial(load, shop.root / "wide")

    def read_slowly() -> LoraAdapter:
        stalled.wait(30)
        return wide()

    slow = [asyncio.create_task(shop.catalog.add_read("wide", read_slowly, client="one")) for _ in range(5)]
    await asyncio.sleep(0.05)
    async with asyncio.timeout(10):
        assert (await shop.catalog.add("narrow", shop.root / "narrow", client="other"))[1]
    stalled.set()
    assert sorted(new for _, new in await asyncio.gather(*slow)) == [False] * 4 + [True]
    assert not shop.catalog.client_locks


async def test_files_of_adapters_without_a_record_are_deleted_at_the_start(shop: Shop) -> None:
    record, _ = await shop.catalog.add("wide", shop.root / "wide")
    shop.sources.land("f" * 64, lambda folder: (folder / "half").touch())
    threads = Threads.start(waiting=9, wait_timeout_s=9)
    service: Any = SimpleNamespace(
        registry=shop.catalog.registry,
        threads=threads,
        materializer=SimpleNamespace(sources=shop.sources),
        files=shop.catalog.files,
    )
    damaged = shop.catalog.registry.snapshot.damaged_adapters
    damaged["other"] = "unreadable"
    await delete_orphans(service)
    assert len(shop.sources.entries()) == 2, "the row that cannot be read may name them"
    damaged.clear()
    await delete_orphans(service)
    assert [entry.key for entry in shop.sources.entries()] == [record.digest]
    threads.close()


async def test_no_folder_outside_the_roots_is_listed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    (shop.root / "out").symlink_to("/usr")
    monkeypatch.setattr(Path, "iterdir", lambda path: pytest.fail(f"{path} was listed"))
    with pytest.raises(ApiError, match="is not a folder inside"):
        shop.catalog.resolve_path(str(shop.root / "out"))


async def test_files_that_the_servers_user_may_not_read_are_named(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "adapter_model.safetensors")  # root may read all
    with pytest.raises(ApiError, match=r"may not read 'adapter_model\.safetensors' in .*; change its mode") as refused:
        shop.catalog.resolve_path(str(shop.root / "wide"))
    assert refused.value.status == 400
