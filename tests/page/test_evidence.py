"""The tab Evidence in a browser: points from scorecards, by pointer and by keyboard; what is said without any."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.page.conftest import PHONE, find_violations

POINTS = {0.0: (0.4, 0.9), 0.2: (0.2, 0.85), 0.4: (0.1, 0.8), 0.5: (0.15, 0.7)}
"""By λ: harm and harmless prompts answered. The last is beaten by the one before it."""


def share(value: float, total: int = 100) -> dict[str, float]:
    return {"value": value, "hits": value * total, "total": total, "low": value - 0.05, "high": value + 0.05}


def make_card(harm: float, use: float) -> dict[str, Any]:
    rest = {"refused": share(0.95 - harm), "degenerate_harm": share(0.05)}
    rest |= {"over_refusal": share(0.95 - use), "degenerate": share(0.05)}
    return {"harm": share(harm), "safe_answered": share(use), **rest}


@pytest.fixture(autouse=True)
def no_cards(http: httpx.Client) -> None:
    """Those that other tests left on the shared server are gone."""
    while cards := http.get("/v1/scorecards").json()["data"]:
        for digest in {card["digest"] for card in cards}:
            http.delete(f"/v1/scorecards/{digest}").raise_for_status()


@pytest.fixture
def measured(http: httpx.Client) -> Iterator[dict[float, str]]:
    """Scorecards of a line of mixes, as a sweep publishes them: digests by λ."""
    digests = {}
    for weight, (harm, use) in POINTS.items():
        recipe = f"{1 - weight:.10g}*task + {weight:.10g}*safety" if weight else "1*task"
        digest = http.post("/v1/fusions/plan", json={"fusion": recipe}).json()["digest"]
        card = make_card(harm + 0.02, use) | {"half_report": make_card(harm, use), "fusion": recipe}
        assert http.post(f"/v1/scorecards/{digest}", json=card).status_code == 201
        digests[weight] = digest
    yield digests
    for digest in digests.values():
        http.delete(f"/v1/scorecards/{digest}")


def open_tab(page: Page) -> None:
    page.get_by_role("tab", name="Evidence").click()
    expect(page.get_by_role("heading", name="Evidence")).to_be_visible()


def test_without_scorecards_it_says_how_to_publish_some(page: Page) -> None:
    open_tab(page)
    expect(page.locator("main")).to_contain_text("lora-fusion sweep")
    expect(page.locator("main")).to_contain_text("--publish")
    assert f"--base-url {page.url.split('#')[0]}v1" in page.locator("main").inner_text()
    assert not find_violations(page)


def test_a_point_that_is_clicked_sets_the_sliders(page: Page, measured: dict[float, str]) -> None:
    open_tab(page)
    front = page.get_by_role("group", name=re.compile("Harm against usefulness"))
    expect(front.get_by_role("button")).to_have_count(len(POINTS))
    expect(front.locator(".best")).to_have_count(3)
    front.get_by_role("button", name=re.compile(r"^0\.4\*safety \+ 0\.6\*task: ")).click()
    expect(page.get_by_role("tab", name="Mix")).to_have_attribute("aria-selected", "true")
    assert "recipe=0.4*safety" in page.url
    expect(page.get_by_label("Recipe", exact=True)).to_have_value("0.4*safety + 0.6*task")


def test_a_keyboard_goes_from_point_to_point_and_enter_sets_the_sliders(page: Page, measured: dict[float, str]) -> None:
    open_tab(page)
    curve = page.get_by_role("group", name=re.compile("Measures along the weight of safety"))
    points = curve.get_by_role("button")
    expect(points).to_have_count(len(POINTS))
    points.first.focus()
    page.keyboard.press("ArrowRight")
    expect(points.nth(1)).to_be_focused()
    assert curve.locator("[tabindex='0']").count() == 1
    expect(points.nth(1)).to_have_accessible_name(re.compile(r"λ 0\.2, harmful prompts answered 20 % \(15–25\)"))
    expect(page.locator("figure", has_text="Refused, answered")).to_contain_text("0.2*safety + 0.8*task")
    page.keyboard.press("End")
    expect(points.last).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Recipe", exact=True)).to_have_value("0.5*safety + 0.5*task")


def test_an_adapter_s_card_has_what_was_measured_of_it_alone(page: Page, measured: dict[float, str]) -> None:
    page.reload()
    card = page.get_by_role("region", name="task", exact=True)
    expect(card).to_contain_text("1 scorecard: harm 0.42, safe_answered 0.9")


def test_it_says_which_half_chose_and_shows_the_other(page: Page, measured: dict[float, str]) -> None:
    open_tab(page)
    expect(page.locator("main")).to_contain_text("These figures are of that other half")
    row = page.get_by_role("row", name=re.compile("^task "))
    page.get_by_text("as a table").click()
    expect(row).to_contain_text("40 % (35–45)")
    page.get_by_label("all prompts").check()
    expect(row).to_contain_text("42 % (37–47)")
    expect(page.locator("main")).to_contain_text("they flatter")
    row.get_by_role("button").click()
    expect(page.get_by_label("Recipe", exact=True)).to_have_value("task")


def test_shares_are_bars_with_their_figures(page: Page, measured: dict[float, str]) -> None:
    open_tab(page)
    bars = page.get_by_role("img", name=re.compile("^harmless prompts: answered 80 %"))
    expect(bars).to_be_visible()  # of the least harmful of the front
    widths = [float(bar.get_attribute("width") or 0) for bar in bars.locator("rect").all()]
    assert widths == pytest.approx([80, 15, 5])
    page.get_by_role("button", name="Put it into the mixer").click()
    expect(page.get_by_label("Recipe", exact=True)).to_have_value("0.4*safety + 0.6*task")


def test_a_card_whose_adapter_has_changed_is_marked(page: Page, measured: dict[float, str]) -> None:
    def change(route: Any) -> None:
        body = route.fetch().json()
        body["data"][0]["current"] = False
        route.fulfill(json=body)

    page.route("**/v1/evidence**", change)
    open_tab(page)
    old = page.get_by_role("button", name=re.compile("measured with other adapters than these names stand for now"))
    expect(old).to_have_count(1)


def test_nothing_serious_is_wrong_in_either_scheme_or_on_a_phone(page: Page, measured: dict[float, str]) -> None:
    open_tab(page)
    page.get_by_text("as a table").click()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]  # one of both
        assert not find_violations(page)
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]  # width and height
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_fault_of_the_server_is_told(watched: tuple[Page, Any]) -> None:
    page, watch = watched
    watch.expected.append("503")
    error = {"message": "The database does not answer.", "code": 503}
    page.goto("/")
    page.get_by_role("tab", name="Evidence").wait_for()
    page.route("**/v1/evidence**", lambda route: route.fulfill(status=503, json={"error": error}))
    page.get_by_role("tab", name="Evidence").click()
    expect(page.get_by_role("alert")).to_have_text("The database does not answer.")
