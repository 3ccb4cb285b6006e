"""Keeping in a browser: versions, their differences, rollback, who changed what; copies that run elsewhere."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import unquote_plus

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.page.conftest import MIX, Watch, visit

NAME = "page/kept"


@pytest.fixture
def name(http: httpx.Client) -> Iterator[str]:
    yield NAME
    http.delete(f"/v1/fusions/{NAME}")


def save(page: Page, name: str, button: str) -> None:
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_role("button", name=button).click()


def test_versions_are_saved_compared_and_rolled_back(page: Page, http: httpx.Client, name: str) -> None:
    page.get_by_label("most tokens", exact=True).check()
    save(page, name, "Save")
    versions = page.get_by_role("region", name=f"Versions of {name}")
    expect(versions).to_contain_text("1 (current)")
    first = http.get(f"/v1/fusions/{name}").json()
    assert (first["recipe"], first["defaults"]) == ("0.4*safety + 0.6*task", {"max_tokens": 64})
    page.get_by_role("slider", name="Weight of task").press("ArrowRight")
    page.get_by_label("Description").fill("a little more of the task")
    page.locator(".verdict strong").wait_for()
    save(page, name, "Save as version 2")
    expect(versions).to_contain_text("2 (current)")
    rows = page.get_by_role("region", name="Differences").get_by_role("row")
    expect(rows).to_contain_text(["What", "task", "description"])
    expect(rows.nth(1)).to_contain_text("0.60.65")
    versions.get_by_role("button", name="Make version 1 the current one").press("Enter")
    expect(versions).to_contain_text("1 (current)")
    assert http.get(f"/v1/fusions/{name}").json()["version"] == 1
    page.get_by_text("Who changed it").click()
    expect(page.get_by_role("region", name=f"Changes of {name}").get_by_role("row").nth(1)).to_contain_text("rollback")
    versions.get_by_role("button", name="Load version 2").click()
    expect(page.get_by_role("slider", name="Weight of task")).to_have_value("0.65")


def test_what_somebody_else_saved_meanwhile_is_not_lost(
    page: Page, watched: tuple[Page, Watch], http: httpx.Client, name: str
) -> None:
    http.put(f"/v1/fusions/{name}", json={"fusion": "1*task"})
    visit(page, MIX)
    http.put(f"/v1/fusions/{name}", json={"fusion": "1*safety"})
    watched[1].expected.append("412")
    save(page, name, "Save as version 2")
    expect(page.get_by_role("alert")).to_contain_text("Somebody else changed page/kept")
    expect(page.get_by_role("region", name=f"Versions of {name}")).to_contain_text("2 (current)")
    assert http.get(f"/v1/fusions/{name}").json()["recipe"] == "safety"


def copied(page: Page, form: str) -> str:
    page.get_by_role("button", name=form, exact=True).click()
    return page.get_by_role("region", name="What is copied").inner_text()


def test_copies_say_the_same_elsewhere(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill('It\'s "three" rivers:\nwhich?')
    page.get_by_text("System message and sampling").click()
    page.get_by_role("spinbutton", name="Most tokens").fill("4")
    assert copied(page, "Recipe") == "0.4*safety + 0.6*task"
    terms = [{"name": "safety", "weight": 0.4}, {"name": "task", "weight": 0.6}]
    assert json.loads(copied(page, "JSON"))["adapters"] == terms
    assert unquote_plus(copied(page, "Link")).endswith("#mix?recipe=0.6*task + 0.4*safety")
    answer = subprocess.run(
        shlex.split(copied(page, "curl").replace("\\\n", "")), capture_output=True, check=True, timeout=120
    )
    text = json.loads(answer.stdout)["choices"][0]["message"]["content"]
    program = subprocess.run(
        [sys.executable, "-c", copied(page, "Python")], capture_output=True, text=True, check=True, timeout=120
    )
    assert program.stdout == f"{text}\n"


def test_a_copy_is_in_the_clipboard(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.locator(".foot [role=status]")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == "0.4*safety + 0.6*task"


def test_a_user_is_offered_nothing_that_the_key_may_not(watched: tuple[Page, Watch]) -> None:
    page, _ = watched
    caller = {"object": "caller", "key": "0f3a5c7e9b1d", "role": "user", "tenant": "", "keys": True}
    limits = {"base": "smollm2-135m-instruct", "max_model_len": 2048, "max_weight": 16}
    page.route("**/v1/whoami", lambda route: route.fulfill(json=caller | limits))
    visit(page, MIX)
    expect(page.get_by_role("tab", name="Operate")).to_have_count(0)
    expect(page.get_by_role("button", name="Save")).to_have_count(0)
    expect(page.get_by_role("button", name="Ask all", exact=True)).to_be_visible()
    assert "FUSION_API_KEY" in copied(page, "curl")
