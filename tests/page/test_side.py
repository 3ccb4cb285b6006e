"""Side by side in a browser: what each answer says of itself, against the same requests made by a program."""

import json
import re
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, Request, Route, expect

from tests.conftest import BASE_NAME
from tests.page.conftest import Watch, change_headers

TOKENS = 6


@pytest.fixture
def bench(page: Page) -> Page:
    """The page with a mix, short answers, and a prompt."""
    page.get_by_text("System message and sampling").click()
    page.get_by_role("spinbutton", name="Most tokens").fill(str(TOKENS))
    page.get_by_label("Prompt", exact=True).fill("Name three rivers.")
    return page


def complete(http: httpx.Client, prompt: str = "Name three rivers.", **target: object) -> httpx.Response:
    body = {
        "model": BASE_NAME,
        "max_tokens": TOKENS,
        "temperature": 0,
        "messages": [{"role": "user", "content": prompt}],
    }
    return http.post("/v1/chat/completions", json=body | target)


def wait_answered(page: Page) -> None:
    expect(page.locator(".pane[aria-busy=true]")).to_have_count(0)


def test_each_pane_shows_what_its_answer_says_of_itself(bench: Page, http: httpx.Client) -> None:
    bench.get_by_role("button", name="Ask all", exact=True).click()
    wanted = {
        "Base": complete(http),
        "Mix": complete(http, fusion="0.6*task + 0.4*safety"),
        "task alone": complete(http, model="task"),
        "safety alone": complete(http, model="safety"),
    }
    wait_answered(bench)
    for title, answer in wanted.items():
        region = bench.get_by_role("region", name=title, exact=True)
        expect(region.locator(".answer")).to_have_text(answer.json()["choices"][0]["message"]["content"])
        said = region.locator(".reported")
        expect(said).to_contain_text(f"{TOKENS} tokens, cut off")
        expect(said).to_contain_text("first token")
        expect(said).to_contain_text("tokens/s")
        expect(said).to_contain_text(answer.headers.get("x-fusion-digest", "the plain base")[:12])
        if title != "Base":
            expect(said).to_contain_text("mixed")
        expect(region.get_by_role("alert")).to_have_count(0)
    expect(bench.locator(".pane .said").first).to_have_text("0.4*safety + 0.6*task")


def test_an_answer_of_another_recipe_is_told(bench: Page) -> None:
    other = {"x_fusion_recipe": "1*wide", "x_fusion_digest": "f" * 64, "x_fusion_mode": "built"}

    def answer(route: Route) -> None:
        change_headers(route, **(other if "fusion" in (route.request.post_data_json or {}) else {}))

    bench.route("**/v1/chat/completions", answer)
    bench.get_by_role("button", name="Ask all", exact=True).click()
    mix = bench.get_by_role("region", name="Mix", exact=True)
    expect(mix.get_by_role("alert")).to_contain_text("but the answer says it came from 1*wide (ffffffffffff).")
    expect(mix.locator(".reported")).to_contain_text("1*wide · built · ffffffffffff")
    wait_answered(bench)
    expect(bench.get_by_role("alert")).to_have_count(1)


def test_a_gate_s_weights_are_the_answer_s(bench: Page, http: httpx.Client) -> None:
    recipe = "gate(fade(1..0.4, 8)*task + 0.8*safety, by=risk, safety in 0..0.8)"
    bench.get_by_label("Recipe", exact=True).fill(recipe)
    bench.locator(".verdict strong").wait_for()
    bench.get_by_role("button", name="Ask all", exact=True).click()
    wait_answered(bench)
    answer = complete(http, fusion=recipe)
    said = bench.get_by_role("region", name="Mix", exact=True).locator(".reported")
    weights = json.loads(answer.headers["x-fusion-weights"])
    assert weights["task"] == {"fade": [1.0, 0.4, 8]}
    expect(said).to_contain_text("task fade(1..0.4, 8)")
    expect(said).to_contain_text(f"safety {weights['safety']:g}")
    expect(said).to_contain_text("gate: chose")


def test_moving_a_slider_asks_the_mix_again_and_nothing_else(bench: Page, http: httpx.Client) -> None:
    bench.get_by_role("button", name="Ask all", exact=True).click()
    wait_answered(bench)
    asked: list[Any] = []

    def note(request: Request) -> None:
        if request.url.endswith("completions"):
            asked.append(json.loads(request.post_data or "")["fusion"])

    bench.on("request", note)
    bench.get_by_role("slider", name="Weight of task").press("ArrowRight")
    answer = complete(http, fusion="0.65*task + 0.4*safety")
    mix = bench.get_by_role("region", name="Mix", exact=True)
    expect(mix.locator(".said")).to_have_text("0.4*safety + 0.65*task")
    wait_answered(bench)
    expect(mix.locator(".answer")).to_have_text(answer.json()["choices"][0]["message"]["content"])
    bench.get_by_label("Recipe", exact=True).fill("svd(0.6*task + 0.4*safety, rank=8)")
    expect(bench.locator(".verdict")).to_contain_text("built")
    bench.wait_for_timeout(200)
    assert asked == ["0.4*safety + 0.65*task"]


def test_tokens_are_coloured_by_what_the_base_would_have_said(bench: Page, http: httpx.Client) -> None:
    bench.get_by_label("colour tokens against the base").check()
    bench.get_by_role("button", name="Ask all", exact=True).click()
    answer = complete(http, model="task", logprobs=True, return_token_ids=True).json()
    entries, ids = answer["choices"][0]["logprobs"]["content"], answer["choices"][0]["token_ids"]
    prompt = [*answer["prompt_token_ids"], *ids]
    scored = http.post(
        "/v1/completions", json={"model": BASE_NAME, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0}
    )
    base = [next(iter(one.values()))["logprob"] for one in scored.json()["choices"][0]["prompt_logprobs"][-len(ids) :]]
    difference = sum(entry["logprob"] for entry in entries) - sum(base)
    region = bench.get_by_role("region", name="task alone", exact=True)
    told = region.get_by_text("The answer as a whole: ")
    expect(told).to_be_visible()
    numbers = re.findall(r"as a whole: ([+−][0-9.]+) in", told.inner_text())
    assert [float(number.replace("−", "-")) for number in numbers] == [pytest.approx(difference, abs=0.01)]
    region.get_by_text("Tokens as a table").click()
    expect(region.get_by_role("row")).to_have_count(len(ids) + 1)
    expect(bench.get_by_role("region", name="Base", exact=True).locator("table")).to_have_count(0)


def test_weights_and_prompts_make_a_table_from_one_stack(bench: Page, http: httpx.Client) -> None:
    bench.get_by_text("Weights × prompts").click()
    bench.get_by_label("Weight of", exact=True).select_option("safety")
    bench.get_by_label("Weights, at most 6").fill("0.2, 0.8")
    bench.get_by_label("Prompts, one a line").fill("Name three rivers.\nHello.")
    bench.get_by_role("button", name="Ask all at once").click()
    expect(bench.get_by_text("4 answers in")).to_contain_text("from 1 stack")
    for row, weight in enumerate((0.2, 0.8)):
        cells = bench.locator(".grid tbody tr").nth(row).locator("td")
        for column, prompt in enumerate(("Name three rivers.", "Hello.")):
            answer = complete(http, prompt, fusion=f"{weight}*safety + 0.6*task")
            expect(cells.nth(column)).to_have_text(answer.json()["choices"][0]["message"]["content"])


def test_the_first_minute_takes_one_press(page: Page) -> None:
    page.get_by_text("System message and sampling").click()
    page.get_by_role("spinbutton", name="Most tokens").fill("4")
    page.get_by_role("button", name="See what that does to three prompts").press("Enter")
    place = page.locator("#answers")
    expect(place).to_be_focused()
    expect(place).to_contain_text("12 answers in")
    expect(place).to_be_in_viewport()
    expect(page.get_by_role("button", name="See what that does")).to_have_count(0)
    page.get_by_role("button", name="All three, at once").press("Enter")
    expect(place).to_have_text("…")
    expect(place).to_contain_text("12 answers in")
    names = page.locator(".grid tbody th > code").all_inner_texts()
    assert names == ["Base", "safety alone", "task alone", "0.6*task + 0.4*safety"]


def test_a_fault_of_one_pane_is_said_there_and_the_others_go_on(bench: Page, watched: tuple[Page, Watch]) -> None:
    watched[1].expected.append("404 (Not Found)")
    bench.get_by_label("Recipe", exact=True).fill("0.6*task + 0.4*nobody")
    expect(bench.locator(".verdict")).to_contain_text("nobody")
    bench.get_by_role("button", name="Ask all", exact=True).click()
    expect(bench.get_by_role("region", name="Mix", exact=True).get_by_role("alert")).to_contain_text("nobody")
    expect(bench.get_by_role("region", name="Base", exact=True).locator(".answer")).not_to_be_empty()
