"""The frame in a browser: tabs by keyboard, the key, what a role sees, how a fault is shown."""

from playwright.sync_api import Page, Route, expect

from tests.page.conftest import Watch, find_violations, visit


def test_tabs_are_turned_by_arrow_keys_and_links(page: Page) -> None:
    page.get_by_role("tab", name="Mix").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Evidence")).to_be_focused()
    expect(page.get_by_role("tab", name="Evidence")).to_have_attribute("aria-selected", "true")
    assert page.url.endswith("#evidence")
    page.go_back()
    expect(page.get_by_role("tab", name="Mix")).to_have_attribute("aria-selected", "true")


def test_who_comes_without_a_recipe_finds_one(watched: tuple[Page, Watch]) -> None:
    page, _ = watched
    visit(page)
    page.locator(".verdict strong").wait_for()
    expect(page.get_by_label("Recipe", exact=True)).not_to_be_empty()
    expect(page.get_by_role("button", name="See what that does to three prompts")).to_be_in_viewport()


def test_nothing_serious_is_wrong_for_who_cannot_see(page: Page) -> None:
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert not find_violations(page)


def test_a_key_is_asked_for_kept_in_the_tab_and_sent_to_this_server_alone(watched: tuple[Page, Watch]) -> None:
    page, watch = watched
    watch.expected.append("401")
    caller = {"object": "caller", "key": "0f3a5c7e9b1d", "role": "user", "tenant": "acme", "keys": True, "base": "b"}

    def answer(route: Route) -> None:
        headers = route.request.headers
        if headers.get("authorization") == "Bearer lf-right":
            route.fulfill(json=caller | {"max_model_len": 64, "max_weight": 16})
        else:
            error = {"message": "The API key is missing or wrong.", "type": "AuthenticationError", "code": 401}
            route.fulfill(status=401, json={"error": error})

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


def test_after_many_wrong_keys_another_one_can_be_entered(watched: tuple[Page, Watch]) -> None:
    page, watch = watched
    watch.expected.append("429")
    message = "This client sent 10 wrong API keys within a minute; no more are looked at for 60 s."
    error = {"error": {"message": message, "type": "RateLimitError", "code": 429}}
    page.route("**/v1/whoami", lambda route: route.fulfill(status=429, json=error))
    page.goto("/")
    page.get_by_label("API key").fill("wrong")
    page.get_by_label("API key").press("Enter")
    expect(page.get_by_role("alert")).to_have_text(message)
    page.unroute("**/v1/whoami")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("tab", name="Mix")).to_be_visible()


def test_a_server_that_starts_is_waited_for(watched: tuple[Page, Watch]) -> None:
    page, watch = watched
    watch.expected.append("503")
    error = {"message": "The engine is starting; wait until /readyz returns 200.", "code": 503}
    page.route("**/v1/whoami", lambda route: route.fulfill(status=503, json={"error": error}), times=1)
    page.goto("/")
    expect(page.get_by_role("status").first).to_contain_text("The engine is starting")
    expect(page.get_by_role("tab", name="Mix")).to_be_visible()
