"""How the page looks and is used: on a phone, in the dark, by keyboard alone."""

from typing import Literal

import pytest
from playwright.sync_api import Page, expect

from tests.page.conftest import PHONE, find_violations


def ask(page: Page, tokens: int) -> None:
    """Have all panes answer the order e-mail."""
    page.get_by_text("System message and sampling").click()
    page.get_by_role("spinbutton", name="Most tokens").fill(str(tokens))
    page.get_by_text("System message and sampling").click()
    page.get_by_role("button", name="An order e-mail").click()
    page.locator(".pane .said").first.wait_for()
    expect(page.locator(".pane[aria-busy=true]")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_is_wrong_with_everything_open(page: Page, scheme: Literal["light", "dark"]) -> None:
    page.emulate_media(color_scheme=scheme)
    page.get_by_label("colour tokens against the base").check()
    page.get_by_label("Shape").first.select_option("steps")
    page.get_by_label("Gate").select_option("risk")
    page.locator(".verdict strong").wait_for()
    ask(page, 6)
    expect(page.get_by_text("The answer as a whole").first).to_be_visible()
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert not find_violations(page)


def test_a_phone_shows_all_of_it_without_scrolling_sideways(page: Page) -> None:
    page.set_viewport_size(PHONE)
    page.get_by_label("Shape").first.select_option("fade")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


CONTROLS = (
    *("task", "Weight of task", "Weight of task, as a number", "Solo task", "Mute task", "Shape", "Recipe", "Gate"),
    *("An order e-mail", "All three, at once", "Prompt", "Most tokens", "Ask all", "Stop", "answer again as I mix"),
    *("Weights × prompts", "Name", "Description", "JSON", "curl", "Copy"),
)
MOST_CONTROLS = 250
"""The shared server has cards of other adapters, too."""


def test_the_keyboard_alone_mixes_asks_and_copies(page: Page) -> None:
    reached: list[str] = []
    missed = [*CONTROLS]
    while missed:
        assert len(reached) < MOST_CONTROLS, f"{missed} not among {reached}"
        page.keyboard.press("Tab")
        name = page.evaluate(
            "(({ariaLabel, labels, textContent, tagName}) => ariaLabel || labels?.[0]?.textContent.trim()"
            " || textContent.trim().slice(0, 40) || tagName)(document.activeElement)"
        )
        is_new = name not in reached
        reached.append(name)
        missed = [wanted for wanted in missed if not name.startswith(wanted)]
        if is_new and name == "Weight of task":
            page.keyboard.press("ArrowUp")
        if is_new and name == "Most tokens":
            page.keyboard.press("Control+A")
            page.keyboard.type("3")
        if is_new and name in ("System message and sampling", "Ask all"):
            page.keyboard.press("Enter")
        if is_new and name == "Prompt":
            page.keyboard.type("Hello.")
    expect(page.get_by_label("Recipe", exact=True)).to_have_value("0.4*safety + 0.65*task")
    expect(page.get_by_role("region", name="Mix", exact=True).locator(".answer")).not_to_be_empty()
