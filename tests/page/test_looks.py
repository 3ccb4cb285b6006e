"""How the page looks and is used: on a phone, in the dark, by keyboard alone; the pictures in the docs."""

import os

import pytest
from playwright.sync_api import Page, expect

from tests.conftest import ROOT
from tests.page.conftest import PHONE, find_violations, visit

MIX = "#mix?recipe=0.6*task+%2B+0.4*safety"
IMAGES = ROOT / "docs/img"
MAX_IMAGE = 200 * 2**10
FILL = {"width": 1100, "height": 800}


def ask(page: Page, tokens: int) -> None:
    """Have all panes answer the order e-mail."""
    page.get_by_text("System message and sampling").click()
    page.get_by_role("spinbutton", name="Most tokens").fill(str(tokens))
    page.get_by_text("System message and sampling").click()
    page.get_by_role("button", name="An order e-mail").click()
    page.locator(".pane .said").first.wait_for()
    expect(page.locator(".pane[aria-busy=true]")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_is_wrong_with_everything_open(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    visit(page, MIX)
    page.get_by_label("colour tokens against the base").check()
    page.get_by_label("Shape").first.select_option("steps")
    page.get_by_label("Gate").select_option("risk")
    page.locator(".verdict strong").wait_for()
    ask(page, 6)
    expect(page.get_by_text("The answer as a whole").first).to_be_visible()
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert not find_violations(page)


def test_a_phone_shows_all_of_it_without_scrolling_sideways(page: Page) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    visit(page, MIX)
    page.get_by_label("Shape").first.select_option("fade")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_the_keyboard_alone_mixes_asks_and_copies(page: Page) -> None:
    visit(page, MIX)
    reached = []
    page.keyboard.press("Tab")
    for _ in range(150):  # as many cards as the shared server has adapters
        name = page.evaluate(
            "(({ariaLabel, labels, textContent, tagName}) => ariaLabel || labels?.[0]?.textContent.trim()"
            " || textContent.trim().slice(0, 40) || tagName)(document.activeElement)"
        )
        is_new = name not in reached  # after the last control comes the first again
        reached.append(name)
        if is_new and name == "Weight of task":
            page.keyboard.press("ArrowUp")
        if is_new and name == "Most tokens":
            page.keyboard.press("Control+A")
            page.keyboard.type("3")
        if is_new and name in ("System message and sampling", "Ask all"):
            page.keyboard.press("Enter")
        if is_new and name == "Prompt":
            page.keyboard.type("Hello.")
        page.keyboard.press("Tab")
    controls = (
        "task",
        "Weight of task",
        "Weight of task, as a number",
        "Solo task",
        "Mute task",
        "Shape",
        "Recipe",
        "Gate",
    )
    bench = (
        "An order e-mail",
        "All three, at once",
        "Prompt",
        "Most tokens",
        "Ask all",
        "Stop",
        "answer again as I mix",
    )
    keep = ("Weights × prompts", "Name", "Description", "JSON", "curl", "Copy")
    missed = [wanted for wanted in (*controls, *bench, *keep) if not any(name.startswith(wanted) for name in reached)]
    assert not missed, reached
    expect(page.get_by_label("Recipe", exact=True)).to_have_value("0.4*safety + 0.65*task")
    expect(page.get_by_role("region", name="Mix", exact=True).locator(".answer")).not_to_be_empty()


def test_pictures_for_the_docs(page: Page) -> None:
    """SCREENSHOTS=1 makes them anew: another machine's fonts would change them at each run."""
    page.set_viewport_size(FILL)  # type: ignore[arg-type]
    visit(page, MIX)
    anew = bool(os.environ.get("SCREENSHOTS"))
    ask(page, 48 if anew else 4)
    end = page.locator(".panes").bounding_box()
    assert end is not None
    clip = {"x": 0, "y": 0, "width": FILL["width"], "height": end["y"] + end["height"] + 12}
    picture = page.screenshot(full_page=True, clip=clip)  # type: ignore[arg-type]
    if anew:
        (IMAGES / "page-mix.png").write_bytes(picture)
    assert 10_000 < len(picture) <= MAX_IMAGE
    assert (IMAGES / "page-mix.png").stat().st_size <= MAX_IMAGE
