"""The page with real keys, in a browser: what a key may not do is not offered, and is never asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, Response, expect

from tests.page.conftest import Watch, find_violations, open_page, run_browser, visit
from tests.service.access.conftest import TENANTS, Served

ACME, GLOBEX, _ = TENANTS


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with run_browser() as browser:
        yield browser


@pytest.fixture
def watched(browser: Browser, served: Served) -> Iterator[tuple[Page, Watch]]:
    yield from open_page(browser, served.url)


@pytest.fixture
def page(watched: tuple[Page, Watch]) -> Page:
    """The page before a key was entered."""
    page, watch = watched
    watch.expected.append("401")
    page.goto("/")
    page.get_by_label("API key").wait_for()
    watch.expected.clear()
    return page


@contextmanager
def nothing_refused(page: Page) -> Iterator[None]:
    """No answer within the block is an error."""
    refused: list[str] = []

    def note(response: Response) -> None:
        if response.status >= 400:
            refused.append(f"{response.status} {response.request.method} {response.url}")

    page.on("response", note)
    yield
    assert not refused


def enter(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_label("API key").press("Enter")
    page.locator(".verdict strong").wait_for()


def ask(page: Page) -> None:
    """Have all panes answer in a few tokens."""
    page.get_by_text("System message and sampling").click()
    page.get_by_role("spinbutton", name="Most tokens").fill("4")
    page.get_by_label("Prompt", exact=True).fill("Name three rivers.")
    page.get_by_role("button", name="Ask all", exact=True).click()
    expect(page.locator(".pane .said").first).to_be_visible()
    expect(page.locator(".pane[aria-busy=true]")).to_have_count(0)


def test_a_user_s_key_mixes_asks_and_copies(page: Page, served: Served) -> None:
    key = served.keys[ACME, "user"]
    with nothing_refused(page):
        enter(page, key)
        expect(page.locator(".visitor")).to_contain_text(f"user of {ACME}")
        expect(page.get_by_role("tab")).to_have_text(["Mix", "Evidence", "Blind vote"])
        page.get_by_label("Recipe", exact=True).fill("0.25*own")
        ask(page)
        said = page.get_by_role("region", name="Mix", exact=True).locator(".reported")
        expect(said).to_contain_text(served.digests[ACME][:12])
        expect(page.get_by_role("alert")).to_have_count(0)
        page.get_by_role("combobox", name="Profile").select_option("both")
        expect(page.get_by_role("button", name="Load version 1")).to_be_visible()
        for name in ("Save", "Make version"):
            expect(page.get_by_role("button", name=name)).to_have_count(0)
        expect(page.get_by_text("Who changed it")).to_have_count(0)
        page.get_by_role("button", name="curl", exact=True).click()
        expect(page.get_by_role("region", name="What is copied")).to_contain_text("$FUSION_API_KEY")
        page.get_by_role("tab", name="Evidence").click()
        expect(page.locator("main")).to_contain_text("0.25*own")
        page.goto("/#operate")
        expect(page.get_by_role("tab", name="Mix")).to_have_attribute("aria-selected", "true")
        assert not find_violations(page)
    text = page.content()
    assert f"{ACME}-secret" in text
    assert GLOBEX not in text
    assert f"{ACME}-system" not in text, "system prompts are for those who may edit them"
    assert key not in text + page.url


def test_a_deployer_s_key_changes_its_tenant_s_things_alone(page: Page, served: Served) -> None:
    with nothing_refused(page):
        enter(page, served.keys[ACME, "deployer"])
        page.get_by_label("Recipe", exact=True).fill("0.5*own + 0.25*task")
        page.locator(".verdict strong").wait_for()
        page.get_by_label("Name", exact=True).fill("from-the-page")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("region", name="Versions of from-the-page")).to_contain_text("1 (current)")
        expect(page.get_by_text("Who changed it")).to_have_count(0)
        page.get_by_role("tab", name="Operate").click()
        expect(page.get_by_text("You see what only your tenant's requests can use.")).to_be_visible()
        expect(page.get_by_role("heading", name="Who changed what")).to_have_count(0)
        expect(page.get_by_role("button", name="Remove own…")).to_be_visible()
        expect(page.get_by_role("button", name="Remove task…")).to_have_count(0)
        assert GLOBEX not in page.content()
    with served.client(ACME, "deployer") as http:
        assert http.get("/v1/fusions/from-the-page").json()["recipe"] == "0.5*own + 0.25*task"
        assert http.delete("/v1/fusions/from-the-page").status_code == 204


def test_a_public_profile_is_used_and_not_changed_by_a_tenant(page: Page, served: Served) -> None:
    with served.client() as http:
        for weight in (0.5, 0.75):
            http.put("/v1/fusions/shown-to-all", json={"fusion": f"{weight}*task"}).raise_for_status()
    with nothing_refused(page):
        enter(page, served.keys[ACME, "deployer"])
        page.get_by_role("combobox", name="Profile").select_option("shown-to-all")
        expect(page.get_by_role("button", name="Load version 1")).to_be_visible()
        expect(page.get_by_role("button", name="Make version 1")).to_have_count(0)
        page.get_by_label("Name", exact=True).fill("shown-to-all")
        expect(page.get_by_text("shown-to-all is public: choose another name.")).to_be_visible()
        expect(page.get_by_role("button", name="Save as version")).to_be_disabled()
    with served.client() as http:
        assert http.delete("/v1/fusions/shown-to-all").status_code == 204


def test_an_admin_sees_who_changed_a_profile_and_a_wrong_key_opens_nothing(
    watched: tuple[Page, Watch], page: Page, served: Served
) -> None:
    watched[1].expected += ["401", "429"]
    page.get_by_label("API key").fill("lf-000000000000-" + "a" * 43)
    page.get_by_label("API key").press("Enter")
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.get_by_role("tab")).to_have_count(0)
    with served.client() as http:  # one of a tenant has the same name
        http.put("/v1/fusions/both", json={"fusion": "0.5*task"}).raise_for_status()
    page.get_by_label("API key").fill(served.keys["", "admin"])
    page.get_by_role("button", name="Use this key").click()
    page.get_by_role("combobox", name="Profile").select_option("both")
    expect(page.get_by_text("Who changed it (1)")).to_be_visible()
    page.reload()
    visit(page)
    expect(page.locator(".visitor")).to_contain_text("admin")
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [0, 0, ""]
    with served.client() as http:
        assert http.delete("/v1/fusions/both").status_code == 204
