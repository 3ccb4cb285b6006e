"""The tab Operate in a browser: the engine's places, limits, adapters and fetches, uploads, the policy, the audit."""

import base64
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

from tests.conftest import ROOT
from tests.page.conftest import LIMIT_MS, PHONE, Watch, find_violations

FOLDER = ROOT / "examples/adapters/task"
FILES = ("adapter_config.json", "adapter_model.safetensors")
MADE = ("dropped", "chosen", "sourced")


def resident(**changes: Any) -> dict[str, Any]:
    member = {"digest": "d" * 64, "names": ["task"]}
    one = {"key": "k" * 64, "kind": "stack", "state": "warm", "adapters": [member], "requests": 0, "seconds": 5.0}
    return {**one, "evictable": True, "in_batch": False, "rank": 8, "error": 0.0, **changes}


STATE = {
    "object": "state",
    "slots": 2,
    "places": 4,
    "free": 1,
    "residents": [
        resident(requests=3, evictable=False, in_batch=True),
        resident(key="l" * 64, kind="build", error=0.012),
        resident(key="m" * 64, state="draining", requests=1, evictable=False, adapters=[]),
        resident(key="n" * 64, state="loading", requests=2, evictable=False, seconds=90),
    ],
    "queue": {"waiting": 2, "oldest_s": 90.0},
    "limits": [{"subject": "key", "name": "0f3a5c7e9b1d", "kind": "tokens", "limit": 1000, "used": 950}],
    "policy": {"id": "e" * 64, "name": "floors"},
}


@pytest.fixture
def operate(page: Page) -> Page:
    page.get_by_role("tab", name="Operate").click()
    expect(page.get_by_role("heading", name="In the engine")).to_be_visible()
    return page


@pytest.fixture
def clean(http: httpx.Client) -> Iterator[None]:
    yield
    for name in MADE:
        http.delete(f"/v1/adapters/{name}")


def test_the_engine_s_places_the_queue_and_limits_are_shown(page: Page) -> None:
    page.route("**/v1/state", lambda route: route.fulfill(json=STATE))
    page.get_by_role("tab", name="Operate").click()
    engine = page.get_by_role("region", name="In the engine")
    expect(engine).to_contain_text("4 places, 2 of them in one batch; 1 free.")
    expect(engine).to_contain_text("2 requests wait for a stack or build; the first was asked for 2 min ago.")
    places = [" ".join(text.split()) for text in engine.get_by_role("listitem").all_inner_texts()]
    assert places == [
        "task stack · 3 requests · rank 8 · in the batch",
        "task build · idle for 5 s · rank 8 · error 0.012 · makes way when needed",
        "mmmmmmmmmmmm stack · 1 request · rank 8 · goes when these end",
        "free",
        "task stack · loading for 2 min, 2 requests waiting · rank 8",
    ]
    expect(page.get_by_role("row", name=re.compile("key 0f3a5c7e9b1d"))).to_contain_text("950 of 1000")
    expect(page.get_by_role("heading", name="Policy floors")).to_be_visible()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]  # one of both
        assert not find_violations(page)
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]  # width and height
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_real_state_has_what_was_asked_for(operate: Page, http: httpx.Client) -> None:
    body = {"model": "0.61*task + 0.39*safety", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    expect(operate.get_by_role("listitem").filter(has_text=re.compile(r"safety|task")).first).to_be_visible()


def test_it_asks_while_it_is_seen_and_stops_when_it_is_not(watched: tuple[Page, Watch]) -> None:
    page, _ = watched
    page.clock.install()
    page.goto("/#operate")
    expect(page.get_by_role("heading", name="In the engine")).to_be_visible()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))

    def wait(seconds: int) -> set[str]:
        """What was asked for within that time."""
        asked.clear()
        page.clock.run_for(1000 * seconds)
        page.evaluate("fetch('/livez').then((answer) => answer.text())")  # what was asked before it is known by then
        return {*asked} - {"livez"}

    def is_asked() -> bool:
        """Whether it asks at all: the next turn is due once the one before is answered, in real time."""
        return any("state" in wait(10) for _ in range(20))

    assert is_asked()
    page.evaluate("Object.defineProperty(document, 'hidden', { get: () => window.unseen });")
    page.evaluate("window.unseen = true; document.dispatchEvent(new Event('visibilitychange'))")
    wait(1)
    assert not wait(60)
    page.evaluate("window.unseen = false; document.dispatchEvent(new Event('visibilitychange'))")
    assert is_asked()
    page.get_by_role("tab", name="Evidence").click()
    wait(1)
    assert "state" not in wait(60)


def test_a_fault_is_told_and_ends_by_itself(watched: tuple[Page, Watch]) -> None:
    page, watch = watched
    watch.expected.append("503")
    error = {"message": "Too many management requests are in progress.", "code": 503}
    page.route("**/v1/state", lambda route: route.fulfill(status=503, json={"error": error}), times=1)
    page.clock.install()
    page.goto("/#operate")
    expect(page.get_by_role("alert")).to_contain_text("Too many management requests")
    page.clock.run_for(60_000)
    expect(page.get_by_role("heading", name="In the engine")).to_be_visible(timeout=LIMIT_MS)
    expect(page.get_by_role("alert")).to_have_count(0)


def drop(page: Page, paths: dict[str, bytes]) -> None:
    """Drop files on the form, as from a desktop."""
    page.evaluate(
        """files => {
            const data = new DataTransfer();
            for (const [name, bytes] of Object.entries(files)) {
                data.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name));
            }
            const form = document.querySelector(".drop");
            form.dispatchEvent(new DragEvent("dragover", { dataTransfer: data, bubbles: true, cancelable: true }));
            form.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        {name: base64.b64encode(content).decode() for name, content in paths.items()},
    )


def pack() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in FILES:
            tar.add(FOLDER / name, name)
    return file.getvalue()


def test_a_dropped_archive_is_registered(operate: Page, clean: None, http: httpx.Client) -> None:
    drop(operate, {"dropped.tar": pack()})
    form = operate.get_by_role("form", name="Upload an adapter")
    expect(form.get_by_role("status")).to_contain_text("dropped.tar, ")
    expect(form.get_by_label("Name")).to_have_value("dropped")
    form.get_by_role("button", name="Upload").click()
    expect(operate.get_by_role("row", name=re.compile("^dropped"))).to_contain_text("ready", timeout=LIMIT_MS)
    assert http.get("/v1/adapters/dropped").json()["rank"] == http.get("/v1/adapters/task").json()["rank"]


def test_files_are_chosen_by_keyboard_uploaded_and_removed(operate: Page, clean: None) -> None:
    form = operate.get_by_role("form", name="Upload an adapter")
    chooser = form.get_by_label("Files")
    chooser.set_input_files([FOLDER / FILES[0]])
    expect(form.get_by_role("status")).to_contain_text("Choose one .tar, or both")
    expect(form.get_by_role("button", name="Upload")).to_be_disabled()
    chooser.set_input_files([FOLDER / name for name in FILES])
    chooser.focus()
    operate.keyboard.press("Tab")
    operate.keyboard.type("chosen")
    operate.keyboard.press("Enter")
    row = operate.get_by_role("row", name=re.compile("^chosen"))
    expect(row).to_contain_text("ready", timeout=LIMIT_MS)
    row.get_by_role("button", name="Remove chosen…").press("Enter")
    row.get_by_role("button", name="Keep").press("Enter")
    row.get_by_role("button", name="Remove chosen…").press("Enter")
    row.get_by_role("button", name="Remove chosen", exact=True).press("Enter")
    expect(row).to_have_count(0, timeout=LIMIT_MS)


def test_a_folder_of_the_server_is_registered_and_a_refusal_told(
    watched: tuple[Page, Watch], clean: None, tmp_path: Path
) -> None:
    page, watch = watched
    watch.expected += ["400", "403", "404"]
    page.goto("/#operate")
    form = page.get_by_role("form", name="Register an adapter from a source")
    form.get_by_label("Folder of the server, or URL").fill(str(tmp_path))
    form.get_by_label("Name").fill("sourced")
    form.get_by_role("button", name="Register").click()
    expect(page.get_by_role("alert")).to_be_visible()
    form.get_by_label("Folder of the server, or URL").fill(str(FOLDER))
    form.get_by_role("button", name="Register").click()
    expect(page.get_by_role("row", name=re.compile("^sourced"))).to_contain_text("ready", timeout=LIMIT_MS)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_fetches_show_how_far_they_are(page: Page) -> None:
    fetch = {"name": "far", "object": "adapter", "source": "hf://o/far", "state": "fetching", "bytes": 2**20}
    fetch |= {"total_bytes": 2**22, "bytes_per_s": 2**19, "eta_s": 6.0}
    failed = {"name": "lost", "object": "adapter", "source": "hf://o/lost", "state": "failed", "reason": "no such file"}
    damaged = {"name": "old", "object": "adapter", "state": "damaged", "reason": "its record: no rank"}
    listed = {"object": "list", "data": [fetch, failed, damaged], "last_id": "old", "has_more": False}
    deleted: list[str] = []

    def answer(route: Route) -> None:
        if route.request.method == "DELETE":
            deleted.append(route.request.url.rsplit("/", 1)[1])
            route.fulfill(status=204)
        else:
            route.fulfill(json=listed)

    page.route(re.compile(r"/v1/adapters"), answer)
    page.goto("/#operate")
    page.reload()
    row = page.get_by_role("row", name=re.compile("^far"))
    expect(row).to_contain_text("fetching, 1 MiB of 4 MiB, 512 KiB/s, 6 s left")
    assert row.get_by_role("progressbar").evaluate("bar => bar.position") == 0.25
    expect(page.get_by_role("row", name=re.compile("^lost"))).to_contain_text("not fetched: no such file")
    expect(page.get_by_role("row", name=re.compile("^old"))).to_contain_text("damaged: its record: no rank")
    assert not find_violations(page)
    row.get_by_role("button", name="Cancel far…").click()
    row.get_by_role("button", name="Cancel far", exact=True).click()
    expect(row.get_by_role("button", name="Cancel far…")).to_be_visible()
    assert deleted == ["far"]


def test_the_policy_s_verdict_follows_what_is_typed(watched: tuple[Page, Watch]) -> None:
    page, watch = watched
    watch.expected.append("400")
    page.goto("/#operate")
    field = page.get_by_label("Would this recipe answer you?")
    verdict = page.get_by_role("region", name="Policy").get_by_role("status")
    field.fill("0.6*task +")
    expect(verdict).to_have_class("fault")
    field.fill("0.6*task + 0.4*safety")
    expect(verdict).to_contain_text("Allowed; mixed")

    def refuse(route: Route) -> None:
        body = route.fetch().json()
        body["policy"] |= {"allowed": False, "rule": "floor-safety", "reason": "safety has 0.1, at least 0.3"}
        route.fulfill(json=body)

    page.route("**/v1/fusions/plan", refuse)
    field.fill("0.9*task + 0.1*safety")
    expect(verdict).to_have_text("Refused by the rule floor-safety: safety has 0.1, at least 0.3")


def test_admins_see_the_audit_newest_first_and_others_do_not(operate: Page, http: httpx.Client) -> None:
    newest = http.get("/v1/audit?order=desc&limit=26").json()["data"]
    audit = operate.get_by_role("region", name="Who changed what")
    rows = audit.get_by_role("row")
    expect(rows.nth(1)).to_contain_text(newest[0]["entry"]["action"])
    expect(rows.nth(1)).to_contain_text(newest[0]["entry"]["target"])
    if len(newest) > 25:
        audit.get_by_role("button", name="Older ones").click()
        expect(rows.nth(26)).to_contain_text(newest[25]["entry"]["target"])
    caller = http.get("/v1/whoami").json() | {"role": "deployer", "keys": True, "key": "0f3a5c7e9b1d"}
    operate.route("**/v1/whoami", lambda route: route.fulfill(json=caller))
    operate.reload()
    expect(operate.get_by_role("heading", name="Adapters")).to_be_visible()
    expect(audit).to_have_count(0)
    operate.unroute("**/v1/whoami")
    operate.route("**/v1/whoami", lambda route: route.fulfill(body=json.dumps(caller | {"role": "user"})))
    operate.reload()
    expect(operate.get_by_role("tab")).to_have_text(["Mix", "Evidence", "Blind vote"])
