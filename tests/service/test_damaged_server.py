"""A server over a data folder and a database with damage in them, and over a database that stalls. One start."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine, text

from adapters import LoraAdapter, Store, fusion_digest, load, parse
from service.materializer import Materializer
from service.placement import stack_key
from service.records import AdapterRecord, ProfileVersion, now
from service.registry import Registry
from tests.conftest import BASE_NAME, Server, launch, stop, wait_ready
from tests.service.conftest import Postgres, adapter_info, fill
from tests.service.test_damage import CONFIG, WEIGHTS, flip

CHAT = {"messages": [{"role": "user", "content": "Count to ten."}], "max_tokens": 4, "temperature": 0}
TIMEOUT_S = 2
STALLED_S = 15
"""More than a call of the database takes twice, on a busy machine."""


@dataclass(frozen=True)
class Shaken:
    """The server under test."""

    url: str
    postgres: Postgres
    builds: Path

    def ask(self, model: str) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json={**CHAT, "model": model}, timeout=300)


def record(name: str, adapter: LoraAdapter) -> AdapterRecord:
    digest = fusion_digest(parse(name), base=BASE_NAME, parents={name: adapter.digest})
    return AdapterRecord(name, adapter.digest, adapter_info(rank=adapter.rank, fusion_digest=digest), now())


def prepare(data: Path, database: str, adapters: dict[str, LoraAdapter]) -> None:
    """A data folder as a server leaves it, and then what happens to disks and databases."""
    materializer = Materializer(Store(data / "adapters", budget_bytes=2**40), 32)
    for adapter in adapters.values():
        materializer.add(adapter)
    pair = [adapters[name].digest for name in ("stable", "pattern")]
    builds = Store(data / "builds", budget_bytes=2**40)
    stack = builds.land(stack_key(pair), lambda entry: materializer.write_stack(sorted(pair), entry))
    flip(stack / WEIGHTS)
    flip(data / "adapters" / adapters["wide"].digest / WEIGHTS)
    (data / "adapters" / adapters["narrow"].digest / CONFIG).write_text("{")
    registry = Registry(database, timeout_s=5)
    parents = {"lost": "9" * 64}
    lost = ProfileVersion("pins-nothing", 1, "1*lost", parents, "8" * 64, created=now())
    fill(registry, *(record(name, adapter) for name, adapter in adapters.items()), lost)
    registry.close()
    engine = create_engine(database)
    info = json.dumps(adapter_info(effect=float("nan")))
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO adapters VALUES ('loud', :d, :i, :c)"), {"d": "7" * 64, "i": info, "c": now()}
        )
        connection.execute(text("INSERT INTO profiles VALUES ('half', 1)"))
        connection.execute(text("INSERT INTO profile_versions VALUES ('half', 1, '{')"))
    engine.dispose()


@pytest.fixture(scope="module")
def shaken(server: Server, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shaken]:
    folder = tmp_path_factory.mktemp("shaken")
    prepare(folder / "data", postgres.url, {name: load(path) for name, path in server.adapters.items()})
    process, url = launch(
        folder / "data",
        server.adapters["wide"].parent,
        folder / "log",
        FUSION_DATABASE=postgres.url,
        FUSION_DATABASE_TIMEOUT_S=str(TIMEOUT_S),
        VLLM_CPU_KVCACHE_SPACE="1",
    )
    try:
        wait_ready(process, url, folder / "log")
        yield Shaken(url, postgres, folder / "data/builds")
    finally:
        stop(process)
        engine = create_engine(postgres.url)
        with engine.begin() as connection:
            for table in ("scorecards", "profile_versions", "profiles", "adapters"):
                connection.execute(text(f"DELETE FROM {table}"))
        engine.dispose()


def states(url: str, path: str) -> dict[str, str]:
    answer = httpx.get(f"{url}{path}", timeout=60)
    assert answer.status_code == 200, answer.text
    return {e.get("name") or e["id"]: (e.get("fusion") or e).get("state", "") for e in answer.json()["data"]}


def test_damage_is_named_and_refuses_its_own_requests(shaken: Shaken, server: Server) -> None:
    bad_files, bad_rows, bad_profiles = {"wide", "narrow"}, {"loud"}, {"half", "pins-nothing"}
    deadline = time.monotonic() + 60
    while {name for name, state in states(shaken.url, "/v1/adapters").items() if state} != bad_files | bad_rows:
        assert time.monotonic() < deadline, "damage was not found after the start"
        time.sleep(0.5)
    assert {n for n, s in states(shaken.url, "/v1/models").items() if s == "damaged"} == (
        bad_files | bad_rows | bad_profiles
    )
    assert {n for n, s in states(shaken.url, "/v1/fusions").items() if s == "damaged"} == bad_profiles
    for name in (*bad_files, *bad_rows, *bad_profiles, "0.5*wide + 0.5*stable", "svd(1*narrow, rank=1)"):
        answer = shaken.ask(name)
        assert answer.status_code == 500, answer.text
        assert "damaged" in answer.json()["error"]["message"]
        assert "delete" in answer.json()["error"]["message"]
        assert str(shaken.builds.parent) not in answer.text
    for name in ("stable", "0.5*stable + 0.5*pattern"):
        answer, expected = (
            shaken.ask(name),
            server.client.with_raw_response.chat.completions.create(
                model=name,
                **CHAT,  # type: ignore[call-overload]  # CHAT's values are of several types
            ),
        )
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-fusion-digest"] == expected.headers["x-fusion-digest"]
        assert answer.json()["choices"][0]["message"]["content"] == expected.parse().choices[0].message.content
    assert shaken.ask("0.5*stable + 0.5*pattern").headers["x-fusion-error"] == "0"


def test_damage_is_mended_by_its_own_routes(shaken: Shaken, server: Server) -> None:
    with httpx.Client(base_url=shaken.url, timeout=300) as http:
        again = http.post("/v1/adapters", json={"name": "wide", "path": str(server.adapters["wide"])})
        assert again.status_code == 200, again.text
        assert shaken.ask("wide").status_code == 200
        assert http.put("/v1/fusions/half", json={"fusion": "1*wide"}).status_code == 200
        assert shaken.ask("half").status_code == 200
        for path in ("adapters/loud", "adapters/narrow", "fusions/half", "fusions/pins-nothing"):
            assert http.delete(f"/v1/{path}").status_code == 204
        added = http.post("/v1/adapters", json={"name": "narrow", "path": str(server.adapters["narrow"])})
        assert added.status_code == 201, added.text
        assert shaken.ask("narrow").status_code == 200
        assert "damaged" not in states(shaken.url, "/v1/models").values()


def test_a_stalled_database_stops_nothing_but_changes(shaken: Shaken) -> None:
    with httpx.Client(base_url=shaken.url, timeout=60) as http, shaken.postgres.stalled():
        for method, path, body in (
            ("PUT", "/v1/fusions/late", {"fusion": "1*stable"}),
            ("GET", f"/v1/scorecards/{'0' * 64}", None),
            ("DELETE", "/v1/adapters/stable", None),
        ):
            started = time.monotonic()
            answer = http.request(method, path, json=body)
            assert (answer.status_code, "retry-after" in answer.headers) == (503, True), answer.text
            assert time.monotonic() - started < STALLED_S
        with ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(httpx.get, f"{shaken.url}/v1/scorecards/{i:064x}", timeout=60) for i in range(20)]
            built = shaken.ask("svd(0.3*stable + 0.7*pattern, rank=2)")
            assert (built.status_code, built.headers["x-fusion-source"]) == (200, "built")
            plan = http.post("/v1/fusions/plan", json={"fusion": "svd(0.2*stable + 0.8*pattern, rank=2)"})
            assert plan.status_code == 200
            assert http.get("/v1/models").status_code == 200
            assert {one.result().status_code for one in asked} == {503}
    deadline = time.monotonic() + 60
    while httpx.get(f"{shaken.url}/v1/scorecards/{'0' * 64}", timeout=60).status_code != 200:
        assert time.monotonic() < deadline, "the database was not found again"
        time.sleep(0.5)
    assert httpx.put(f"{shaken.url}/v1/fusions/late", json={"fusion": "1*stable"}, timeout=60).status_code in (200, 201)
    assert httpx.delete(f"{shaken.url}/v1/fusions/late", timeout=60).status_code == 204


def test_a_second_server_on_the_same_database_does_not_start(shaken: Shaken, server: Server, tmp_path: Path) -> None:
    roots = server.adapters["wide"].parent
    process, _ = launch(tmp_path / "data", roots, tmp_path / "log", FUSION_DATABASE=shaken.postgres.url)
    try:
        assert process.wait(120) == 1
    finally:
        stop(process)
    last = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error: ")][-1]
    assert "another server uses the registry" in last
    assert "FUSION_DATABASE" in last
