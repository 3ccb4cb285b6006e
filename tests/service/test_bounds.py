"""What clients leave behind is bounded, listed in parts, and can be removed again."""

import asyncio
import gc
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from adapters import parse
from service.defaults import Defaults
from service.errors import ApiError
from service.front import Front, build_app
from service.profiles import MAX_VERSION_BYTES
from service.records import AdapterRecord, ProfileVersion, now
from service.registry import Registry
from service.resolve import Names
from service.routes import models
from service.scorecards import MAX_PAGE_BYTES
from service.settings import Settings
from tests.service.conftest import adapter_info, fill, make_service
from tests.service.shops import Shop
from tests.service.test_catalog import shop  # noqa: F401 - a fixture

NAMES = ("a", "b", "c", "d", "e")
BUDGET = 200_000


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Any]:
    """The parts of a service that need no engine."""
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    names = Names("base", registry, max_weight=16, max_norm=math.inf)
    for number, name in enumerate(NAMES):
        digest = f"{number}" * 64
        fusion = names.bind(parse(name), [AdapterRecord(name, digest, {"rank": 1}, now())])
        fill(registry, AdapterRecord(name, digest, adapter_info(fusion_digest=fusion.digest), now()))
    yield make_service(registry, names, Settings(registry_bytes=BUDGET))
    registry.close()


@pytest.fixture
def http(service: Any) -> TestClient:
    front = Front()
    front.start(service)
    return TestClient(front, raise_server_exceptions=False)


def test_one_client_gets_a_share_of_the_management_routes(service: Any) -> None:
    app = build_app(service)
    http = TestClient(app)
    while app.state.shares.take("name testclient"):
        pass
    answer = http.get("/v1/adapters")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
    assert app.state.shares.take("another client")
    app.state.shares.free("name testclient")
    assert http.get("/v1/adapters").status_code == 200


def read_all(http: TestClient, path: str, limit: int) -> list[dict[str, Any]]:
    """All entries of a list, `limit` at a time."""
    entries: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        body = http.get(path, params={"limit": str(limit)} | after).raise_for_status().json()
        entries += body["data"]
        assert len(body["data"]) <= limit
        if not body["has_more"]:
            return entries
        after = {"after": body["last_id"]}


def profile(name: str, number: int = 1, **values: Any) -> ProfileVersion:
    return ProfileVersion(name, number, "1*a", {"a": "0" * 64}, "e" * 64, created=now(), **values)


@pytest.mark.parametrize("limit", [1, 2, 5, 1000])
def test_lists_come_in_parts(http: TestClient, service: Any, limit: int) -> None:
    fill(service.registry, *(profile(f"p{name}") for name in NAMES))
    for number in range(5):
        assert http.post(f"/v1/scorecards/{'e' * 64}", json={"n": number}).status_code == 201
    assert [adapter["name"] for adapter in read_all(http, "/v1/adapters", limit)] == [*NAMES]
    assert [entry["name"] for entry in read_all(http, "/v1/fusions", limit)] == [f"p{name}" for name in NAMES]
    assert [card["n"] for card in read_all(http, f"/v1/scorecards/{'e' * 64}", limit)] == [0, 1, 2, 3, 4]
    for wrong in ("0", "-1", "1001", "x"):
        assert http.get("/v1/adapters", params={"limit": wrong}).status_code == 400


def test_a_part_of_large_entries_is_short(http: TestClient, service: Any) -> None:
    large = {"system": "x" * 2**16}
    fill(service.registry, *(profile(f"p{number}", defaults=large) for number in range(40)))
    answer = http.get("/v1/fusions")
    assert answer.json()["has_more"]
    assert len(answer.content) < MAX_PAGE_BYTES + 2**17
    assert len(read_all(http, "/v1/fusions", 1000)) == 40


def test_scorecards_are_for_fusions_that_there_are(http: TestClient, service: Any) -> None:
    fill(service.registry, profile("named"))
    mix = service.names.resolve_recipe(parse("0.3*a + 0.7*b"))
    known = service.registry.adapters["a"].info["fusion_digest"]
    for digest in (known, "e" * 64):
        assert http.post(f"/v1/scorecards/{digest}", json={"x": 1}).status_code == 201
    for digest, body in ((mix.digest, {"x": 1}), ("9" * 64, {"fusion": "0.5*a + 0.5*b"}), ("9" * 64, {})):
        refused = http.post(f"/v1/scorecards/{digest}", json=body)
        assert refused.status_code == 404
        assert "add its recipe as 'fusion'" in refused.json()["error"]["message"]
    assert http.post(f"/v1/scorecards/{mix.digest}", json={"fusion": "1*nobody"}).status_code == 404
    assert http.post(f"/v1/scorecards/{mix.digest}", json={"x": 1, "fusion": "0.7*b+.3*a"}).status_code == 201
    service.names.look_up("0.25*a + 0.75*b")  # as a request or a plan does
    lately = service.names.resolve_recipe(parse("0.25*a + 0.75*b")).digest
    assert http.post(f"/v1/scorecards/{lately}", json={"x": 1}).status_code == 201
    counts = {entry["digest"]: entry["count"] for entry in http.get("/v1/scorecards").json()["data"]}
    assert counts == dict.fromkeys((known, "e" * 64, mix.digest, lately), 1)


def test_a_full_registry_says_so_and_is_emptied_again(http: TestClient, service: Any) -> None:
    fill(service.registry, profile("named"))
    before = service.registry.snapshot.nbytes
    path, card = f"/v1/scorecards/{'e' * 64}", {"x": "y" * 60_000}
    made = [http.post(path, json=card) for _ in range(5)]
    assert [answer.status_code for answer in made] == [201, 201, 201, 409, 409]
    message = made[-1].json()["error"]["message"]
    assert f"FUSION_REGISTRY_BYTES={BUDGET}" in message
    assert "delete profiles or scorecards first" in message
    assert http.delete(f"{path}/{made[0].json()['scorecard_id']}").status_code == 204
    assert http.post(path, json=card).status_code == 201
    assert http.delete(path).status_code == 204
    assert http.delete(path).status_code == 404
    assert http.delete(f"{path}/1").status_code == 404
    assert service.registry.snapshot.nbytes == before
    assert http.get(path).json()["data"] == []


@pytest.mark.parametrize("stop", ["x" * 1025, ["x"] * 65, ["x" * 1025]])
def test_stop_strings_are_bounded(stop: Any) -> None:
    with pytest.raises(ValidationError):
        Defaults.model_validate({"stop": stop})


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_versions_are_bounded_in_size_and_together(shop: Shop) -> None:  # noqa: F811 - a fixture
    await shop.catalog.add("wide", shop.root / "wide")
    with pytest.raises(ApiError, match="at most 262144 bytes as JSON") as caught:
        await shop.profiles.put("large", "1*wide", defaults={"system": "x" * MAX_VERSION_BYTES})
    assert caught.value.status == 413
    small = replace(shop.profiles, settings=replace(shop.profiles.settings, registry_bytes=5000))
    for _ in range(3):
        await small.put("even", "1*wide")
    with pytest.raises(ApiError, match="The registry is full") as caught:
        await small.put("even", "1*wide")
    assert caught.value.status == 409
    await small.remove("even")
    await small.put("even", "1*wide")


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_an_alias_of_a_pinned_adapter_can_go(shop: Shop) -> None:  # noqa: F811 - a fixture
    for name in ("wide", "alias"):
        await shop.catalog.add(name, shop.root / "wide")
    await shop.profiles.put("even", "0.5*wide")
    await shop.catalog.remove("alias")
    with pytest.raises(ApiError, match="'wide' is used by even"):
        await shop.catalog.remove("wide")
    await shop.catalog.add("alias", shop.root / "wide")
    await shop.catalog.remove("wide")
    fusion = shop.catalog.names.look_up("even")
    assert fusion is not None
    assert fusion.rank == 3
    assert len(shop.sources.entries()) == 1


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_files_wait_for_a_database_that_does_not_say_whether_it_has_their_record(
    shop: Shop,  # noqa: F811 - a fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = shop.catalog.registry

    async def fail(record: AdapterRecord) -> None:
        registry._database.disconnect()  # noqa: SLF001 - as a connection that is lost does
        raise ApiError(503, "the connection is lost") from OperationalError("", {}, Exception())

    with monkeypatch.context() as patch:
        patch.setattr(registry, "add_adapter", fail)
        with pytest.raises(ApiError, match="the connection is lost"):
            await shop.catalog.add("wide", shop.root / "wide")
    assert len(shop.sources.entries()) == 1
    await shop.catalog.add("narrow", shop.root / "narrow")
    assert [entry.key for entry in shop.sources.entries()] == [registry.adapters["narrow"].digest]


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_a_list_of_all_names_leaves_the_event_loop_to_others(service: Any) -> None:
    snapshot = service.registry.snapshot
    for number in range(4096):
        digest = f"{number:064x}"
        info = adapter_info(fusion_digest=digest)
        snapshot.adapters[f"x{number}"] = AdapterRecord(f"x{number}", digest, info, now())
        snapshot.ranks[digest] = 1
        snapshot.profiles[f"y{number}"] = ProfileVersion(
            f"y{number}", 1, f"1*x{number}", {f"x{number}": digest}, digest
        )
    gaps: list[float] = []
    parts: list[bytes] = []

    async def read() -> None:
        async for part in models.ModelList(service).write(service.names):
            parts.append(part.encode())

    gc.freeze()  # as vLLM does once it has started: a walk over all that pytest holds takes half a second
    try:
        listing = asyncio.create_task(read())
        while not listing.done():
            started = time.thread_time()  # of this thread alone: the machine may be busy
            await asyncio.sleep(0)
            gaps.append(time.thread_time() - started)
        await listing
    finally:
        gc.unfreeze()
    assert len(json.loads(b"".join(parts))["data"]) == 2 * 4096 + len(NAMES) + 1
    assert max(map(len, parts)) < 2 * models.PART_BYTES  # an answer is never in memory as a whole
    assert max(gaps) < 0.2
