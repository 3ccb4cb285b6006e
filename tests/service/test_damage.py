"""What is damaged in the registry or the store: named in the lists, and refused alone."""

import asyncio
import json
import math
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from starlette.testclient import TestClient

from adapters.files.checksums import is_whole, write_checksums
from service.errors import ApiError
from service.front import Front
from service.records import AdapterRecord, ProfileVersion
from service.registry import Registry, to_json
from service.resolve import Names
from service.scorecards import Scorecards
from service.settings import Settings
from tests.adapters import samples
from tests.service.conftest import World, adapter_info, fill, make_service

CREATED = "2026-01-01T00:00:00+00:00"
NAN = '{"rank": 1, "modules": 1, "bytes": 8, "dtype": "float32", "fusion_digest": "%s", "effect": NaN}' % ("f" * 64)
BODY = ProfileVersion("p", 1, "1*good", {"good": "d" * 64}, "e" * 64, created=CREATED).body()
BAD_ADAPTERS: dict[str, tuple[str | bytes, ...]] = {
    "nan": ("d" * 64, NAN, CREATED),
    "cut": ("d" * 64, "{", CREATED),
    "list": ("d" * 64, "[1]", CREATED),
    "empty": ("d" * 64, "{}", CREATED),
    "hash": ("../../etc", json.dumps(adapter_info()), CREATED),
    "time": ("d" * 64, json.dumps(adapter_info()), "yesterday"),
    "blob": ("d" * 64, b"\xff\xfe", CREATED),
    "text": (b"\xff" * 64, json.dumps(adapter_info()), CREATED),
    "svd": ("d" * 64, json.dumps(adapter_info()), CREATED),
    "shadow": ("d" * 64, json.dumps(adapter_info(name="other", state=1)), CREATED),
}
BAD_VERSIONS: dict[str, str] = {
    "half": "{",
    "bare": "{}",
    "more": json.dumps(BODY | {"surprise": 1}),
    "dance": json.dumps(BODY | {"recipe": "dance(1*good)"}),
    "orphan": json.dumps(BODY | {"parents": {}}),
    "inf": json.dumps(BODY | {"defaults": {"temperature": float("inf")}}),
    "odd": json.dumps(BODY | {"defaults": {"stop": [1]}}),
    "null": "null",
}
LOST = json.dumps(BODY | {"parents": {"good": "9" * 64}})


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry of one good adapter and one good profile among rows that cannot be read."""
    path = tmp_path / "registry.sqlite"
    fill(
        first := Registry(f"sqlite:///{path}", timeout_s=5),
        AdapterRecord("good", "d" * 64, adapter_info(), CREATED),
        ProfileVersion("fine", 1, "1*good", {"good": "d" * 64}, "e" * 64, created=CREATED),
    )
    first.close()
    with closing(sqlite3.connect(path)) as database, database:
        for name, row in BAD_ADAPTERS.items():
            database.execute("INSERT INTO adapters VALUES (?, ?, ?, ?, NULL)", (name, *row))
        for name, version in (BAD_VERSIONS | {"lost": LOST}).items():
            database.execute("INSERT INTO profiles VALUES (?, 1)", (name,))
            database.execute("INSERT INTO profile_versions VALUES (?, 1, ?, NULL)", (name, version))
        database.execute("INSERT INTO profiles VALUES ('Not A Name', 1)")
        database.execute("INSERT INTO profiles VALUES ('hollow', 7)")
        database.execute("INSERT INTO profile_versions VALUES ('fine', 2, '[', NULL)")
        for body in ('{"x": NaN}', "{", "[]", '{"x": 1}', b"\xff"):
            database.execute("INSERT INTO scorecards (digest, body, created) VALUES (?, ?, '')", ("e" * 64, body))
    registry = Registry(f"sqlite:///{path}", timeout_s=5)
    yield registry
    registry.close()


@pytest.fixture
def http(registry: Registry) -> TestClient:
    """The service's routes over that registry."""
    front = Front()
    front.start(make_service(registry, Names("base", registry, max_weight=16, max_norm=math.inf), Settings()))
    return TestClient(front, raise_server_exceptions=False)


def states(entries: list[dict[str, Any]], key: str = "name") -> dict[str, str]:
    return {entry[key]: (entry.get("fusion") or entry).get("state", "") for entry in entries}


def test_bad_rows_are_named_in_the_lists_with_their_reason(http: TestClient) -> None:
    adapters = http.get("/v1/adapters").json()["data"]
    bad = dict.fromkeys({*BAD_ADAPTERS} - {"shadow"}, "damaged")
    assert states(adapters) == bad | {"good": "", "shadow": ""}
    assert all(entry["reason"] for entry in adapters if entry["name"] in bad)
    assert "'effect' should be a finite number, got NaN" in next(e for e in adapters if e["name"] == "nan")["reason"]
    profiles = http.get("/v1/fusions").json()["data"]
    bad_profiles = dict.fromkeys((*BAD_VERSIONS, "hollow", "lost", "Not A Name"), "damaged")
    assert states(profiles) == bad_profiles | {"fine": ""}
    assert all(entry["reason"] for entry in profiles if entry["name"] in bad_profiles)
    models = http.get("/v1/models")
    assert models.status_code == 200
    expected = {"base": "", "good": "evicted", "shadow": "evicted", "fine": "evicted"}
    assert states(models.json()["data"], "id") == bad | bad_profiles | expected
    for name in (*bad, *bad_profiles):
        assert http.get(f"/v1/models/{name}").status_code in (200, 500)
    cards = http.get(f"/v1/scorecards/{'e' * 64}").json()["data"]
    assert [card.get("state") for card in cards] == ["damaged", "damaged", "damaged", None, "damaged"]


def test_bad_rows_refuse_their_own_requests_and_no_others(registry: Registry) -> None:
    names = Names("base", registry, max_weight=16, max_norm=math.inf)
    for name in ("good", "fine", "0.5*good", "fine@1"):
        assert names.look_up(name) is not None
    for name in (*BAD_VERSIONS, "hollow", "lost", "lost@1", "half@1", "fine@2", "nan", "0.5*cut", "1*good + 1*list"):
        with pytest.raises(ApiError, match=r"is damaged: .*delete") as caught:
            names.look_up(name)
        assert caught.value.status == 500


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_bad_rows_can_be_overwritten_and_deleted(registry: Registry, tmp_path: Path) -> None:
    await registry.add_adapter(AdapterRecord("nan", "a" * 64, adapter_info(), CREATED))
    await registry.remove_adapter("cut")
    number = max(registry.version_numbers("half")) + 1
    await registry.add_version(ProfileVersion("half", number, "1*good", {"good": "d" * 64}, "e" * 64, created=CREATED))
    await registry.remove_profile("hollow")
    await registry.remove_profile("bare")
    await Scorecards(Settings(), registry, asyncio.Lock()).remove("e" * 64)
    registry.close()
    again = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    assert again.snapshot == registry.snapshot
    assert {"nan", "good"} <= {*again.adapters}
    assert {"half", "fine"} <= {*again.profiles}
    assert not {"cut", "nan"} & {*again.snapshot.damaged_adapters}
    assert not {"bare", "half", "hollow"} & {*again.snapshot.damaged_profiles}
    again.close()


FLIPS = [
    ("profile_versions", "body", "1*good", "3*good", "fine"),
    ("profile_versions", "checksum", "", "0", "fine"),
    ("adapters", "info", '"effect": 1.0', '"effect": 9.0', "good"),
    ("adapters", "created", "2026", "2027", "good"),
    ("nameless_adapters", "info", '"rank": 1', '"rank": 2', "fine"),
]
"""Table, column, what changes in it to what, and what is no longer served."""


@pytest.mark.parametrize(("table", "column", "old", "new", "victim"), FLIPS)
def test_a_row_with_a_changed_byte_can_still_be_read_and_is_not_served(
    url: str, table: str, column: str, old: str, new: str, victim: str
) -> None:
    record = AdapterRecord("good", "d" * 64, adapter_info(), CREATED)
    version = ProfileVersion("fine", 1, "1*good", {"good": record.digest}, "e" * 64, created=CREATED)
    fill(registry := Registry(url, timeout_s=5), record, version)
    if table == "nameless_adapters":
        asyncio.run(registry.remove_adapter("good"))
    registry.close()
    engine = create_engine(url)
    change = f"{column} = replace({column}, :old, :new)" if old else f"{column} = :new || substr({column}, 2)"
    with engine.begin() as connection:
        assert connection.execute(text(f"UPDATE {table} SET {change}"), {"old": old, "new": new}).rowcount == 1
    engine.dispose()
    registry = Registry(url, timeout_s=5)
    names = Names("base", registry, max_weight=16, max_norm=math.inf)
    with pytest.raises(ApiError, match=r"damaged: .*(checksum does not fit what it holds|no adapter).*; .*delete"):
        names.look_up(victim)
    fill(registry, record, replace(version, version=2))  # registered again, as the messages say
    assert names.look_up("fine") is not None
    assert names.look_up("good") is not None
    registry.close()


def test_nan_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"effect": float("nan")})


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


WEIGHTS, CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    (WEIGHTS, flip),
    (WEIGHTS, Path.unlink),
    (WEIGHTS, lambda file: file.write_bytes(file.read_bytes()[:-8])),
    (WEIGHTS, lambda file: file.write_bytes(b"")),
    (WEIGHTS, replace_by_folder),
    (CONFIG, lambda file: file.write_text("{")),
    (CONFIG, lambda file: file.write_text(file.read_text().replace(samples.BASE, samples.BASE[::-1]))),
    (CONFIG, Path.unlink),
    (CONFIG, replace_by_folder),
    ("adapter", shutil.rmtree),
    (".", shutil.rmtree),
]


def plan(w: World, recipe: str) -> dict[str, Any]:
    """What is planned for a recipe, for which its adapters are read."""
    fusion = w.fusion(recipe)
    return w.materializer.plan(fusion, w.pool.place(fusion))


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_stored_adapters_that_have_changed_are_refused_and_mended(
    world: Callable[..., World], file: str, damage: Callable[[Path], object]
) -> None:
    w = world()
    digest = w.adapters["a"].digest
    entry = w.materializer.sources.get(digest)
    assert entry is not None
    damage(entry / file)
    assert not w.materializer.check(digest)
    assert w.materializer.damage[digest]
    with pytest.raises(
        ApiError, match=r"The stored files of adapter '.*' are damaged; delete and re-register"
    ) as caught:
        plan(w, "1*a + 1*b")
    assert caught.value.status == 500
    assert str(entry) not in caught.value.message
    assert plan(w, "1*b + 1*c")["mode"] == "mixed"
    w.materializer.add(w.adapters["a"])
    assert w.materializer.check(digest)
    assert not w.materializer.damage


def test_a_stored_header_that_cannot_be_read_is_damage_and_no_client_s_fault(world: Callable[..., World]) -> None:
    w = world()
    digest = w.adapters["a"].digest
    entry = w.materializer.sources.get(digest)
    assert entry is not None
    weights = entry / WEIGHTS
    weights.write_bytes(weights.read_bytes().replace(b'"dtype"', b'"dty\x01e"', 1))
    with pytest.raises(ApiError, match=r"The stored files of adapter '.*' are damaged") as caught:
        w.materializer.open(digest)
    assert caught.value.status == 500
    assert w.materializer.damage[digest]


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
@pytest.mark.parametrize(("file", "damage"), [*DAMAGES, ("report.json", flip), ("checksums.json", Path.unlink)])
async def test_stored_stacks_that_have_changed_are_made_again(
    world: Callable[..., World], file: str, damage: Callable[[Path], object]
) -> None:
    w = world(capacity=1)
    await w.warm("1*a + 1*b")
    (key,) = w.residency.residents
    await w.warm("1*c")  # which takes the one place
    damage(w.store.root / key / file)
    async with w.pool.lease(w.fusion("1*a + 1*b")) as lease:
        assert lease.source == "built"
        assert is_whole(lease.resident.path)
    await w.warm("1*c")
    async with w.pool.lease(w.fusion("1*a + 1*b")) as lease:
        assert lease.source == "loaded"


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_damage_is_found_after_a_start_before_anybody_asks(world: Callable[..., World]) -> None:
    w = world()
    digest = w.adapters["b"].digest
    flip(w.materializer.sources.root / digest / WEIGHTS)
    ranks = {adapter.digest: adapter.rank for adapter in w.adapters.values()}
    known = w.adapters["c"].digest
    norms = {**dict.fromkeys(ranks, 0.0), known: 7.0}
    registry: Any = SimpleNamespace(ranks=ranks, snapshot=SimpleNamespace(norms=norms))
    await w.files.check(registry)
    assert {*w.materializer.damage} == {digest}
    measured = w.materializer.headroom.check(w.adapters["a"])
    assert (norms[w.adapters["a"].digest], norms[known], norms[digest]) == (measured, 7.0, 0.0)


def test_a_file_more_is_a_change_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    write_checksums(tmp_path)
    assert is_whole(tmp_path)
    (tmp_path / "b").write_text("x")
    assert not is_whole(tmp_path)
