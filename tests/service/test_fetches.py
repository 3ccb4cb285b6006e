"""Fetches in the background: what the routes say of them, one for a name, one client's share, and on after a kill."""

import asyncio
import logging
import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from adapters import load
from adapters.files import CONFIG, WEIGHTS
from service.audit import Actor, current_actor, read_entries
from service.errors import ApiError
from service.records import AdapterRecord
from service.settings import Settings
from service.shipped import register_shipped
from service.sources.fetches import FOLDER, MAX_FETCHES, Order
from tests.service.fetching import fetch, fetching, routed
from tests.service.rings import make_keys
from tests.service.shops import Shop
from tests.service.source_servers import Handler, files, serve, share, start_body, tag
from tests.service.test_catalog import shop  # noqa: F401 - a fixture

WHO = Actor("k1", "deployer", "", "192.0.2.7", "req-1")
pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


async def test_what_is_running_when_the_server_is_killed_goes_on_where_it_was(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = files(shop.root / "wide")
    slow = True

    def answer(handler: Handler) -> None:
        if handler.path.endswith(WEIGHTS) and slow:
            start_body(handler, content_length=str(len(contents[WEIGHTS])), etag=tag(contents[WEIGHTS]))
            handler.wfile.write(contents[WEIGHTS][:1500])
            handler.wfile.flush()
            time.sleep(5)
        else:
            share({f"/x/{name}": content for name, content in contents.items()})(handler)

    with serve(answer) as host:
        async with fetching(shop, host.url, timeout_s=20) as fetches:
            token = current_actor.set(WHO)
            first = fetches.start(Order("wide", f"{host.url}/x", "client"))
            current_actor.reset(token)
            while first.download.progress.bytes < 1500 + len(contents[CONFIG]):
                await asyncio.sleep(0.01)
            assert (first.state, first.download.progress.total) == ("fetching", sum(map(len, contents.values())))
        slow = False
        folder = shop.catalog.settings.data / FOLDER
        (folder / "stray").mkdir()
        for name, text in (
            ("broken", "{"),
            ("list", "[]"),
            ("odd", '{"folder": "x", "order": {"name": 7, "source": 7}}'),
        ):
            (folder / f"{name}.json").write_text(text)
        async with fetching(shop, host.url) as fetches:  # the next server
            fetches.resume()
            again = fetches.get("wide")
            assert again is not None
            record, new = await again.wait()
            assert (record.digest, new) == (load(shop.root / "wide").digest, True)
            await asyncio.sleep(0.1)
        assert not list(folder.iterdir())
        (row,) = await shop.catalog.registry.transact(partial(read_entries, after=0, limit=9))
        assert Actor(**row.to_dict()["entry"]["by"]) == WHO, "whoever asked before the kill"
        assert current_actor.get() == Actor()
    assert host.asked[-1][2]["range"] == "bytes=1500-"
    assert host.asked[-1][2]["if-range"] == tag(contents[WEIGHTS])
    assert len(host.asked) == 3


async def test_one_source_is_fetched_once_however_many_want_it(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = {f"/x/{name}": content for name, content in files(shop.root / "wide").items()}
    with serve(share(contents)) as host:
        async with fetching(shop, host.url) as fetches:
            order = Order("wide", f"{host.url}/x", "client")
            first = fetches.start(order)
            assert fetches.start(Order("wide", f"{host.url}/x", "other client")) is first
            with pytest.raises(ApiError, match="'wide' is being fetched from"):
                fetches.start(Order("wide", f"{host.url}/y", "client"))
            second = fetches.start(Order("narrow", f"{host.url}/x", "other client"))
            (one, _), (other, _) = await asyncio.gather(first.wait(), second.wait())
            assert one.digest == other.digest
    assert len(host.asked) == 2


async def test_what_a_revoked_key_has_asked_for_is_not_registered(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = {f"/x/{name}": content for name, content in files(shop.root / "wide").items()}
    revoked, keys = threading.Event(), make_keys(shop.catalog.registry, shop.catalog.settings)
    await keys.create("admin")
    key, _ = await keys.create("deployer")

    def answer(handler: Handler) -> None:
        revoked.wait(30)
        share(contents)(handler)

    with serve(answer) as host:
        async with fetching(shop, host.url, timeout_s=30) as fetches:
            token = current_actor.set(Actor(key.id, "deployer"))
            asked = fetches.start(Order("wide", f"{host.url}/x", f"key {key.id}"))
            await keys.revoke(key.id)
            revoked.set()
            with pytest.raises(ApiError, match=f"The API key {key.id} was revoked meanwhile") as caught:
                await asked.wait()
            assert (caught.value.status, asked.state) == (403, "failed")
            with pytest.raises(ApiError, match="was revoked meanwhile"):  # an upload that was under way, too
                await shop.catalog.add("wide", shop.root / "wide")
            current_actor.reset(token)
            assert not shop.catalog.registry.adapters
            await shop.catalog.add("wide", shop.root / "wide")


async def test_tenants_share_no_download(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = {f"/x/{name}": content for name, content in files(shop.root / "wide").items()}
    with serve(share(contents)) as host:
        async with fetching(shop, host.url) as fetches:
            both = [fetches.start(Order("wide", f"{host.url}/x", t, tenant=t)) for t in ("acme", "globex")]
            assert both[0].download is not both[1].download
            await asyncio.gather(*(each.wait() for each in both))
    assert len(host.asked) == 4


async def test_one_client_cannot_have_all_fetches(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = {f"/x/{name}": content for name, content in files(shop.root / "wide").items()}

    def answer(handler: Handler) -> None:
        if handler.path.startswith("/slow"):
            time.sleep(3)
        share(contents)(handler)

    with serve(answer) as host:
        async with fetching(shop, host.url, timeout_s=20) as fetches:
            greedy = [fetches.start(Order(f"g{i}", f"{host.url}/slow{i}", "greedy")) for i in range(100)]
            await asyncio.sleep(0.2)
            assert [fetch.state for fetch in greedy].count("fetching") == 3
            async with asyncio.timeout(2):
                await fetch(fetches, f"{host.url}/x")
            with pytest.raises(ApiError, match="Too many fetches are queued") as caught:
                for i in range(100, 200):
                    fetches.start(Order(f"g{i}", f"{host.url}/slow{i}", "greedy"))
            assert caught.value.status == 429
            assert fetches.start(Order("again", f"{host.url}/x", "other"))
            assert await fetches.cancel("g0")
            with pytest.raises(ApiError, match="was ended by a DELETE"):
                await greedy[0].wait()
            assert not await fetches.cancel("g0")


async def test_a_askedthat_cannot_be_written_down_leaves_nothing_taken(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = {f"/x/{name}": content for name, content in files(shop.root / "wide").items()}
    place = shop.catalog.settings.data / FOLDER
    with serve(share(contents)) as host:
        async with fetching(shop, host.url) as fetches:
            place.write_text("a file where the folder should be")
            for _ in range(MAX_FETCHES):
                with pytest.raises(OSError, match="File exists"):
                    fetches.start(Order("wide", f"{host.url}/x", "client"))
            assert (fetches.get("wide"), fetches.names()) == (None, [])
            place.unlink()
            assert await fetch(fetches, f"{host.url}/x") == load(shop.root / "wide").digest
    assert len(host.asked) == 2


async def test_no_secret_is_in_an_answer_or_a_file(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811 - a fixture
    with serve(lambda handler: handler.send(403)) as host:
        table = f'["{host.url}/"]\nusername = "ada"\npassword = "hunter2"'
        s3 = f'["s3://models/"]\nendpoint = "{host.url}"\nregion = "x"'
        s3 += '\naccess_key_id = "AKIA"\nsecret_access_key = "hunter2"'
        async with fetching(shop, host.url, "s3://models", credentials=f"{table}\n{s3}") as fetches:
            for source in (f"{host.url}/x", "s3://models/x"):
                words = "answered 403 for .*; check FUSION_SOURCE_CREDENTIALS"
                with caplog.at_level(logging.DEBUG), pytest.raises(ApiError, match=words) as caught:
                    await fetch(fetches, source, "other")
                assert not {"hunter2", "AKIA", "Signature", "aHVudGVy"} & set(str(caught.value).split("'"))
                assert "hunter2" not in str(caught.value)
                assert "X-Amz" not in str(caught.value)
    assert "hunter2" not in caplog.text
    assert "X-Amz" not in caplog.text
    assert host.asked[0][2]["authorization"].startswith("Basic ")


async def test_the_routes_say_how_far_a_askedis(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = {f"/x/{name}": content for name, content in files(shop.root / "wide").items()}
    gate = threading.Event()

    def answer(handler: Handler) -> None:
        if handler.path.endswith(WEIGHTS):
            content = contents[handler.path]
            start_body(handler, content_length=str(len(content)))
            handler.wfile.write(content[:2000])
            handler.wfile.flush()
            gate.wait(30)
            handler.wfile.write(content[2000:])
        else:
            share(contents)(handler)

    with serve(answer) as host:
        body = {"name": "org/wide", "source": f"{host.url}/x"}
        async with fetching(shop, host.url, timeout_s=30) as fetches, routed(shop, fetches) as http:
            answered = await http.post("/v1/adapters", json=body)
            assert answered.status_code == 202
            queued = {**body, "object": "adapter", "state": answered.json()["state"]}
            assert answered.json() == queued | {key: answered.json()[key] for key in answered.json().keys() - queued}
            while (card := (await http.get("/v1/adapters/org/wide")).json()).get("bytes", 0) < 2000:
                await asyncio.sleep(0.01)
            assert card["state"] == "fetching"
            assert card["total_bytes"] == sum(map(len, contents.values()))
            assert card["eta_s"] >= 0
            assert card["bytes_per_s"] > 0
            assert (await http.get("/v1/adapters")).json()["data"][0]["state"] == "fetching"
            assert (await http.post("/v1/adapters", json=body)).status_code == 202
            other = await http.post("/v1/adapters", json={**body, "source": f"{host.url}/y"})
            assert (other.status_code, other.json()["error"]["param"]) == (409, "name")
            gate.set()
            while (card := (await http.get("/v1/adapters/org/wide")).json()).keys() & {"state", "fetch"}:
                await asyncio.sleep(0.01)
            assert card["digest"] == load(shop.root / "wide").digest

            failing = {"name": "org/wide", "source": f"{host.url}/none", "replace": True}
            assert (await http.post("/v1/adapters", json=failing)).status_code == 202
            while (card := (await http.get("/v1/adapters/org/wide")).json())["fetch"]["state"] != "failed":
                await asyncio.sleep(0.01)
            assert "answered 404" in card["fetch"]["reason"]
            assert card["digest"] == load(shop.root / "wide").digest, "the name stands for what it did"
            assert (await http.delete("/v1/adapters/org/wide")).status_code == 204
            assert (await http.get("/v1/adapters/org/wide")).status_code == 404


async def test_a_askedin_progress_ends_with_a_delete(shop: Shop) -> None:  # noqa: F811 - a fixture
    def answer(handler: Handler) -> None:
        time.sleep(2)

    with serve(answer) as host:
        async with fetching(shop, host.url, timeout_s=30) as fetches, routed(shop, fetches) as http:
            assert (await http.post("/v1/adapters", json={"name": "x", "source": f"{host.url}/x"})).status_code == 202
            load_it = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": f"{host.url}/x"})
            loading = asyncio.create_task(load_it)
            await asyncio.sleep(0.1)
            assert (await http.delete("/v1/adapters/x")).status_code == 204
            assert (await loading).status_code == 409
            assert (await http.get("/v1/adapters/x")).status_code == 404
            await asyncio.sleep(0.1)
            assert not list((shop.catalog.settings.data / FOLDER).iterdir())


async def test_vllms_route_answers_once_it_is_fetched(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = {f"/x/{name}": content for name, content in files(shop.root / "wide").items()}
    with serve(share(contents)) as host:
        async with fetching(shop, host.url) as fetches, routed(shop, fetches) as http:
            body = {"lora_name": "wide", "lora_path": f"{host.url}/x"}
            answer = await http.post("/v1/load_lora_adapter", json=body)
            assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'wide' added successfully.")
            assert (await http.post("/v1/load_lora_adapter", json=body)).status_code == 200, (
                "as often as it is asked for"
            )
            answer = await http.post("/v1/load_lora_adapter", json={**body, "lora_name": "y", "lora_path": "hf://a/b"})
            assert (answer.status_code, answer.json()["error"]["param"]) == (403, "source")
            for wrong in ({}, {"source": "x", "path": "x"}):
                answer = await http.post("/v1/adapters", json={"name": "y", **wrong})
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "source")
            answer = await http.post("/v1/adapters", json={"name": "y", "source": str(shop.root / "narrow")})
            assert answer.status_code == 201, answer.text


async def test_adapters_of_the_settings_are_fetched_before_the_server_is_ready(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = {f"/x/{name}": content for name, content in files(shop.root / "wide").items()}
    with serve(share(contents)) as host:
        async with fetching(shop, host.url) as fetches:
            settings = Settings(adapters=(f"wide={host.url}/x", f"same={host.url}/x"), profiles=("half=0.5*wide",))
            service: Any = SimpleNamespace(
                settings=settings,
                names=shop.catalog.names,
                registry=shop.catalog.registry,
                catalog=shop.catalog,
                fetches=fetches,
                profiles=shop.profiles,
            )
            await register_shipped(service)
            known: dict[str, AdapterRecord] = dict(shop.catalog.registry.adapters)
            assert known["wide"].digest == known["same"].digest
            assert "half" in shop.catalog.registry.profiles
            service.settings = Settings(adapters=(f"other={host.url}/none",), profiles=())
            with pytest.raises(RuntimeError, match=r"FUSION_ADAPTERS names 'other=http://.*answered 404"):
                await register_shipped(service)
    assert len(host.asked) == 3, "twice for both names"
