"""The frame in a browser: tabs by keyboard, the key, what a role sees, how a fault is shown."""

from playwright.sync_api import Page, expect

from tests.page.conftest import Watch, find_violations


def test_tabs_are_turned_by_arrow_keys_and_links(page: Page) -> None:
    page.get_by_role("tab", name="Mix").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Evidence")).to_be_focused()
    expect(page.get_by_role("tab", name="Evidence")).to_have_attribute("aria-selected", "true")
    assert page.url.endswith("#evidence")
    page.go_back()
    expect(page.get_by_role("tab", name="Mix")).to_have_attribute("aria-selected", "true")


def test_nothing_serious_is_wrong_for_who_cannot_see(page: Page) -> None:
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert not find_violations(page)


def test_a_key_is_asked_for_kept_in_the_tab_and_sent_to_this_server_alone(watched: tuple[Page, Watch]) -> None:
    page, watch = watched
    watch.expected.append("401")
    caller = {"object": "caller", "key": "0f3a5c7e9b1d", "role": "user", "tenant": "acme", "keys": True, "base": "b"}

    def answer(route: object) -> None:
        headers = route.request.headers  # type: ignore[attr-defined]
        if headers.get("authorization") == "Bearer lf-right":
            route.fulfill(json=caller | {"max_model_len": 64, "max_weight": 16})  # type: ignore[attr-defined]
        else:
            error = {"message": "The API key is missing or wrong.", "type": "AuthenticationError", "code": 401}
            route.fulfill(status=401, json={"error": error})  # type: ignore[attr-defined]

    page.route("**/v1/whoami", answer)
    page.goto("/")
    field = page.get_by_label("API key")
    field.fill("wrong")
    field.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("missing or wrong")
    field.fill("lf-right")
    field.press("Enter")
    expect(page.get_by_role("tab")).to_have_text(["Mix", "Evidence", "Blind vote"])
    assert "user of acme" in page.locator(".visitor").inner_text()
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_server_that_starts_is_waited_for(watched: tuple[Page, Watch]) -> None:
    page, watch = watched
    watch.expected.append("503")
    error = {"message": "The engine is starting; wait until /readyz returns 200.", "code": 503}
    page.route("**/v1/whoami", lambda route: route.fulfill(status=503, json={"error": error}), times=1)
    page.goto("/")
    expect(page.get_by_role("status").first).to_contain_text("The engine is starting")
    expect(page.get_by_role("tab", name="Mix")).to_be_visible()
