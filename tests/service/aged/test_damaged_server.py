"""A server over a data folder and a database with damage in them, and over a database that stalls."""

import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.conftest import Server, stop
from tests.service.aged.conftest import CHAT, Aged
from tests.service.own import HASTY, Own

STALLED_S = 15
"""More than a call of the database takes twice, on a busy machine."""


def states(url: str, path: str) -> dict[str, str]:
    answer = httpx.get(f"{url}{path}", timeout=60)
    assert answer.status_code == 200, answer.text
    return {e.get("name") or e["id"]: (e.get("fusion") or e).get("state", "") for e in answer.json()["data"]}


def test_damage_is_named_and_refuses_its_own_requests(aged: Aged, server: Server) -> None:
    bad_files, bad_rows, bad_profiles = {"wide", "narrow"}, {"not-a-number"}, {"half", "pins-nothing"}
    deadline = time.monotonic() + 60
    while {name for name, state in states(aged.url, "/v1/adapters").items() if state} != bad_files | bad_rows:
        assert time.monotonic() < deadline, "damage was not found after the start"
        time.sleep(0.5)
    assert {n for n, s in states(aged.url, "/v1/models").items() if s == "damaged"} == (
        bad_files | bad_rows | bad_profiles
    )
    assert {n for n, s in states(aged.url, "/v1/fusions").items() if s == "damaged"} == bad_profiles
    for name in (*bad_files, *bad_rows, *bad_profiles, "0.5*wide + 0.5*stable", "svd(1*narrow, rank=1)"):
        answer = aged.ask(name)
        assert answer.status_code == 500, answer.text
        assert "damaged" in answer.json()["error"]["message"]
        assert "delete" in answer.json()["error"]["message"]
        assert str(aged.builds.parent) not in answer.text
    for name in ("stable", "0.5*stable + 0.5*pattern"):
        answer, expected = (
            aged.ask(name),
            server.client.with_raw_response.chat.completions.create(
                model=name,
                **CHAT,  # type: ignore[call-overload]  # CHAT's values are of several types
            ),
        )
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-fusion-digest"] == expected.headers["x-fusion-digest"]
        assert answer.json()["choices"][0]["message"]["content"] == expected.parse().choices[0].message.content
    assert aged.ask("0.5*stable + 0.5*pattern").headers["x-fusion-error"] == "0"


def test_damage_is_mended_by_its_own_routes(aged: Aged, server: Server) -> None:
    with httpx.Client(base_url=aged.url, timeout=300) as http:
        again = http.post("/v1/adapters", json={"name": "wide", "path": str(server.adapters["wide"])})
        assert again.status_code == 200, again.text
        assert aged.ask("wide").status_code == 200
        assert http.put("/v1/fusions/half", json={"fusion": "1*wide"}).status_code == 200
        assert aged.ask("half").status_code == 200
        for path in ("adapters/not-a-number", "adapters/narrow", "fusions/half", "fusions/pins-nothing"):
            assert http.delete(f"/v1/{path}").status_code == 204
        added = http.post("/v1/adapters", json={"name": "narrow", "path": str(server.adapters["narrow"])})
        assert added.status_code == 201, added.text
        assert aged.ask("narrow").status_code == 200
        assert "damaged" not in states(aged.url, "/v1/models").values()


def test_a_stalled_database_stops_nothing_but_changes(aged: Aged) -> None:
    with httpx.Client(base_url=aged.url, timeout=60) as http, aged.postgres.stalled():
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
            asked = [pool.submit(httpx.get, f"{aged.url}/v1/scorecards/{i:064x}", timeout=60) for i in range(20)]
            built = aged.ask("svd(0.3*stable + 0.7*pattern, rank=2)")
            assert (built.status_code, built.headers["x-fusion-source"]) == (200, "built")
            plan = http.post("/v1/fusions/plan", json={"fusion": "svd(0.2*stable + 0.8*pattern, rank=2)"})
            assert plan.status_code == 200
            assert http.get("/v1/models").status_code == 200
            assert {one.result().status_code for one in asked} == {503}
    deadline = time.monotonic() + 60
    while httpx.get(f"{aged.url}/v1/scorecards/{'0' * 64}", timeout=60).status_code != 200:
        assert time.monotonic() < deadline, "the database was not found again"
        time.sleep(0.5)
    assert httpx.put(f"{aged.url}/v1/fusions/late", json={"fusion": "1*stable"}, timeout=60).status_code in (200, 201)
    assert httpx.delete(f"{aged.url}/v1/fusions/late", timeout=60).status_code == 204


def test_a_second_server_on_the_same_database_does_not_start(aged: Aged) -> None:
    folder = Path(tempfile.mkdtemp(prefix="own"))
    own = Own(folder, site=HASTY, FUSION_DATABASE=aged.postgres.url)
    try:
        last = own.error()
    finally:
        stop(own.process)
        shutil.rmtree(folder, ignore_errors=True)
    assert "another server uses the registry" in last
    assert "FUSION_DATABASE" in last
