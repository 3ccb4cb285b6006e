"""Mixing in a browser: sliders, text, curves, gates and the server's verdict, each following the other."""

import re

from playwright.sync_api import Page, Request, expect

from tests.page.conftest import MIX, Watch, visit


def recipe(page: Page, text: str) -> None:
    """Wait until the recipe's box has `text`."""
    expect(page.get_by_label("Recipe", exact=True)).to_have_value(text)


def verdict(page: Page, words: str) -> None:
    expect(page.locator(".verdict")).to_contain_text(words)


def test_a_slider_its_number_and_the_text_are_one(page: Page) -> None:
    slider = page.get_by_role("slider", name="Weight of task")
    expect(slider).to_have_value("0.6")
    assert [slider.get_attribute(name) for name in ("min", "max", "step")] == ["-2", "2", "0.05"]
    slider.press("ArrowRight")
    recipe(page, "0.4*safety + 0.65*task")
    slider.press("Home")
    recipe(page, "0.4*safety + -2*task")
    number = page.get_by_label("Weight of task, as a number")
    number.fill("0.123")
    recipe(page, "0.4*safety + 0.123*task")
    page.get_by_label("Recipe", exact=True).fill("1.5*task + 0.25*safety")
    expect(slider).to_have_value("1.5")
    expect(number).to_have_value("1.5")
    expect(page.get_by_role("slider", name="Weight of safety")).to_have_value("0.25")
    verdict(page, "mixed, rank 16")
    recipe(page, "1.5*task + 0.25*safety")  # what is typed stays as it was typed


def test_cards_say_what_an_adapter_is_and_take_it_in_and_out(page: Page) -> None:
    card = page.get_by_role("region", name="task", exact=True)
    for words in (
        "rank 8",
        "120 modules",
        "base smollm2-135m-instruct",
        "effect",
        "no scorecards",
        "recommended 0.5 to 1",
    ):
        expect(card).to_contain_text(words)
    bar = card.locator(".range rect")
    assert [float(bar.get_attribute(name) or 0) for name in ("x", "width")] == [62.5, 12.5]  # of -2 to 2, in per cent
    box = page.get_by_role("checkbox", name="task", exact=True)
    box.press("Space")
    recipe(page, "0.4*safety")
    box.press("Space")
    recipe(page, "0.4*safety + 1*task")


def test_solo_and_mute_leave_terms_out_and_bring_them_back(page: Page) -> None:
    mute, solo = page.get_by_role("button", name="Mute safety"), page.get_by_role("button", name="Solo safety")
    mute.press("Enter")
    expect(mute).to_have_attribute("aria-pressed", "true")
    recipe(page, "0.6*task")
    solo.press("Enter")
    recipe(page, "0.4*safety")
    solo.press("Enter")
    mute.press("Enter")
    recipe(page, "0.4*safety + 0.6*task")


def test_schedules_are_curves_that_keys_and_the_pointer_move(page: Page) -> None:
    card = page.get_by_role("region", name="safety", exact=True)
    shape = card.get_by_label("Shape")
    shape.select_option("ramp")
    recipe(page, "ramp(0.4..0.4)*safety + 0.6*task")
    page.get_by_role("slider", name="Weight of safety in the last layer").press("ArrowUp")
    recipe(page, "ramp(0.4..0.45)*safety + 0.6*task")
    verdict(page, "mixed, rank 16")
    shape.select_option("fade")
    last = page.get_by_role("slider", name="Weight of safety from token 8 on")
    last.press("ArrowRight")
    page.get_by_role("slider", name="Weight of safety from token 9 on").press("PageUp")
    recipe(page, "fade(0.4..0.5, 9)*safety + 0.6*task")
    shape.select_option("steps")
    card.get_by_role("button", name="Add a step").press("Enter")
    recipe(page, "steps(prompt: 0.4, 0: 0.4, 4: 0, 8: 0)*safety + 0.6*task")
    point = page.get_by_role("slider", name="Weight of safety from token 9 of the answer on")
    box = point.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y - 40, steps=5)
    page.mouse.up()
    text = page.get_by_label("Recipe", exact=True).input_value()
    start, weight = text.split(", ")[-1].split(")")[0].split(": ")
    assert int(start) > 8
    assert 0.3 < float(weight) < 2
    verdict(page, "phases")


def test_what_no_curve_can_show_stays_as_it_is_written(page: Page) -> None:
    text = "{*.mlp.*: 0.2, *: 0.6}*safety + 1*task"
    page.get_by_label("Recipe", exact=True).fill(text)
    expect(page.get_by_role("region", name="safety", exact=True)).to_contain_text("{*.mlp.*: 0.2, *: 0.6}")
    page.get_by_role("slider", name="Weight of task").press("ArrowLeft")
    recipe(page, "{*.mlp.*: 0.2, *: 0.6}*safety + 0.95*task")


def test_a_gate_is_a_choice_with_bounds(page: Page) -> None:
    page.get_by_label("Gate").select_option("risk")
    card = page.get_by_role("region", name="safety", exact=True)
    card.get_by_label("the gate chooses").press("Space")
    card.get_by_label("to").fill("0.8")
    recipe(page, "gate(0.4*safety + 0.6*task, by=risk, safety in 0..0.8)")
    page.get_by_label("on the answer alone").press("Space")
    recipe(page, "gate(answer(0.4*safety + 0.6*task), by=risk, safety in 0..0.8)")
    verdict(page, "mixed")


def test_the_verdict_follows_the_text_and_nothing_is_built(page: Page) -> None:
    asked: list[str] = []

    def note(request: Request) -> None:
        asked.append(request.url.rpartition("/v1/")[2])

    page.on("request", note)
    box = page.get_by_label("Recipe", exact=True)
    box.fill("svd(0.6*task + 0.4*safety, rank=8)")
    verdict(page, "built")
    verdict(page, "It is built once when it is first asked")
    expect(page.locator(".recipe-box")).to_contain_text("method svd")
    page.get_by_role("button", name="As a sum").click()
    recipe(page, "0.4*safety + 0.6*task")
    verdict(page, "The policy allows it")
    assert set(asked) == {"fusions/plan"}


def test_a_text_that_is_no_recipe_is_answered_with_the_server_s_words(watched: tuple[Page, Watch]) -> None:
    page, watch = watched
    watch.expected.append("400 (Bad Request)")
    visit(page, MIX)
    page.get_by_label("Recipe", exact=True).fill("tiess(0.6*task, density=0.5)")
    verdict(page, "unknown method 'tiess': did you mean 'ties'?")
    expect(page.get_by_role("slider", name="Weight of task")).to_have_value("0.6")


def test_what_the_policy_refuses_is_said_with_its_reason(page: Page) -> None:
    page.route("**/v1/fusions/plan", lambda route: route.fulfill(json=REFUSED))
    page.get_by_label("Recipe", exact=True).fill("0.6*task")
    verdict(page, "The policy refuses it (kept-apart): no such mix")


REFUSED = {
    "recipe": "0.6*task",
    "fusion": {"adapters": [{"name": "task", "weight": 0.6}], "method": "sum"},
    "digest": "0" * 64,
    "mode": "mixed",
    "stack": "0" * 64,
    "reason": None,
    "rank": 8,
    "policy": {"id": "0" * 64, "allowed": False, "rule": "kept-apart", "reason": "no such mix"},
}


def test_the_address_follows_the_mix_and_never_reaches_the_server(page: Page) -> None:
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    visit(page, MIX)
    page.get_by_role("slider", name="Weight of task").press("ArrowRight")
    expect(page).to_have_url(re.compile(r"#mix\?recipe=.*0\.65\*task"))
    page.evaluate("location.hash = '#mix?recipe=0.2*safety'")
    expect(page.get_by_role("slider", name="Weight of safety")).to_have_value("0.2")
    assert not [url for url in sent if "task" in url.partition("#")[0]]
