"""The tab Blind vote in a browser: names stay hidden until the vote, and the exported votes are what `eval` reads."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from eval_clients.votes import count_votes, read_votes
from tests.page.conftest import LIMIT_MS, PHONE, find_violations

MIX = "0.4*safety + 0.6*task"


@pytest.fixture
def answered(page: Page) -> None:
    """Answers without an engine."""

    def answer(route: Route) -> None:
        body = json.loads(route.request.post_data or "{}")
        is_base = "*" not in body["model"]
        headers = {} if is_base else {"x-fusion-digest": "d" * 64, "x-fusion-recipe": MIX.replace(" ", "%20")}
        message = {"role": "assistant", "content": "Base says no." if is_base else "Mix says yes."}
        route.fulfill(json={"choices": [{"message": message}]}, headers=headers)

    page.route("**/v1/chat/completions", answer)


def open_tab(page: Page, other: str = MIX) -> None:
    page.get_by_role("tab", name="Blind vote").click()
    page.get_by_label("The other").fill(other)
    page.get_by_label("Prompt").fill("May I?")


def ask(page: Page) -> None:
    page.get_by_role("button", name="Ask both").click()
    expect(page.get_by_role("region", name="Two answers")).to_be_focused(timeout=LIMIT_MS)


def draw_seed(page: Page, seed: int) -> None:
    """Have the next comparisons drawn with this seed."""
    page.evaluate("seed => { crypto.getRandomValues = (array) => array.fill(seed); }", seed)


def test_names_are_hidden_until_the_vote(page: Page, answered: None) -> None:
    open_tab(page)
    ask(page)
    panes = page.get_by_role("region", name="Two answers")
    expect(panes).to_contain_text("Mix says yes.")
    expect(panes).to_contain_text("Base says no.")
    assert not re.search("safety|smollm|dddd|base model", panes.inner_html())
    page.get_by_role("button", name="Tie").click()
    expect(panes).to_contain_text(MIX)
    expect(panes).to_contain_text("d" * 12)
    expect(page.get_by_role("button", name="Tie")).to_be_disabled()
    assert not find_violations(page)
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]  # width and height
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_seed_decides_the_order_and_both_orders_come(page: Page, answered: None) -> None:
    open_tab(page)
    for seed, left in ((2, "Base says no."), (3, "Mix says yes.")):
        draw_seed(page, seed)
        ask(page)
        expect(page.get_by_role("region", name="Two answers").locator(".card").first).to_contain_text(left)
        page.keyboard.press("t")
    votes = page.evaluate("JSON.parse(localStorage['fusion-votes'])")
    assert [(vote["seed"], vote["a"]["answer"]) for vote in votes] == [(2, "Base says no."), (3, "Mix says yes.")]


def test_votes_are_cast_by_keyboard_and_read_by_eval(page: Page, answered: None, tmp_path: Path) -> None:
    open_tab(page)
    for key in ("a", "B", "t"):
        draw_seed(page, 4)
        page.get_by_label("Prompt").focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_role("region", name="Two answers")).to_be_focused()
        page.keyboard.press(key)
        page.keyboard.press("a")  # what is chosen is chosen
    expect(page.get_by_role("heading", name="3 votes")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSONL").press("Enter")
    assert download.value.suggested_filename == "votes.jsonl"
    file = tmp_path / "votes.jsonl"
    download.value.save_as(file)
    tally = count_votes(*read_votes([file]))
    assert (tally.votes, {(one.label == MIX, one.wins, one.losses, one.ties) for one in tally.records}) == (
        3,
        {(True, 1, 1, 1), (False, 1, 1, 1)},
    )
    vote = json.loads(file.read_text().splitlines()[0])
    assert (vote["prompt"], vote["seed"], vote["choice"]) == ("May I?", 4, "a")
    assert vote["b"] == {"model": MIX, "recipe": MIX, "digest": "d" * 64, "answer": "Mix says yes."}


def test_votes_stay_in_the_browser_within_a_bound_until_they_are_deleted(page: Page, answered: None) -> None:
    pane = {"model": "x", "recipe": None, "digest": None, "answer": ""}
    vote = {"time": "2026-01-31T12:00:00Z", "seed": 1, "prompt": "p", "choice": "a", "a": pane}
    votes = [vote | {"b": pane | {"model": "y"}, "seed": seed} for seed in range(1000)]
    page.evaluate("votes => { localStorage['fusion-votes'] = JSON.stringify(votes); }", votes)
    page.reload()
    open_tab(page)
    ask(page)
    page.keyboard.press("a")
    kept = page.evaluate("JSON.parse(localStorage['fusion-votes'])")
    assert (len(kept), kept[0]["seed"], kept[-1]["prompt"]) == (1000, 1, "May I?")
    page.get_by_role("button", name="Delete…").click()
    page.get_by_role("button", name="Keep them").click()
    expect(page.get_by_role("heading", name="1000 votes")).to_be_visible()
    page.get_by_role("button", name="Delete…").click()
    page.get_by_role("button", name="Delete all votes").click()
    expect(page.get_by_text("No votes yet.")).to_be_visible()
    assert page.evaluate("localStorage.length") == 0


def test_two_names_of_one_mix_are_no_comparison(page: Page, answered: None) -> None:
    open_tab(page)
    page.get_by_label("One model, or recipe").fill("0.6*task + 0.4*safety")
    page.get_by_role("button", name="Ask both").click()
    expect(page.get_by_role("alert")).to_have_text("Both names stand for the same mix.")
    page.get_by_label("One model, or recipe").fill(MIX)
    page.get_by_role("button", name="Ask both").click()
    expect(page.get_by_role("alert")).to_have_text("Choose two different models.")


def test_the_real_server_answers_both_and_what_it_does_not_know_is_told(watched: tuple[Page, Any]) -> None:
    page, watch = watched
    watch.expected.append("404")
    page.goto("/#vote")
    page.get_by_label("Tokens of an answer at most").fill("4")
    page.get_by_label("The other").fill("nobody")
    page.get_by_role("button", name="Ask both").click()
    expect(page.get_by_role("alert")).to_contain_text("'nobody'")
    page.get_by_label("The other").fill(MIX)
    ask(page)
    page.keyboard.press("b")
    expect(page.get_by_role("region", name="Two answers")).to_contain_text(MIX)
    vote = page.evaluate("JSON.parse(localStorage['fusion-votes'])[0]")
    assert {vote[side]["recipe"] for side in "ab"} == {None, MIX}


def test_a_comparison_is_stopped(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: None)
    open_tab(page)
    page.get_by_role("button", name="Ask both").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Ask both")).to_be_enabled()
    expect(page.get_by_role("alert")).to_have_count(0)
