"""The pictures in docs/page.md and docs/page-evidence.md: each shows what the page shows now.

SCREENSHOTS=1 writes them anew. Otherwise they are made, with short answers, and thrown away: another machine's fonts
and times would change them at each run.
"""

import io
import json
import os
import re
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, FloatRect, Page, ViewportSize, expect

from tests.conftest import ROOT, Server
from tests.page.conftest import MIX, PHONE, SHIPPED, open_page, visit

ANEW = bool(os.environ.get("SCREENSHOTS"))
IMAGES = ROOT / "docs/img"
PAGES = [ROOT / "docs" / name for name in ("page.md", "page-evidence.md")]
MAX_BYTES = 150 * 1024
COLORS = 96
DESK: ViewportSize = {"width": 1100, "height": 800}
MEASURED = ROOT / "benchmarks/results/positions.json"
MARGIN = 4


@pytest.fixture
def page(browser: Browser, shipped: Server) -> Iterator[Page]:
    """A page on a desk that lists what a fresh `make serve` has, whatever else is on the shared server."""
    for page, _ in open_page(browser, shipped.url, viewport=DESK):
        page.route(
            re.compile(r"/v1/(adapters|fusions)\?"),
            lambda route: route.fulfill(json=keep_shipped(route.fetch().json())),
        )
        yield page


def keep_shipped(answer: dict[str, list[dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    return answer | {"data": [card for card in answer["data"] if card["name"] in SHIPPED]}


def take(page: Page, name: str, until: str = "", top: str = "") -> None:
    """Keep what the page shows, from the element `top` (the page's top) to the end of `until` (what is in sight), as
    docs/img/NAME.
    """
    page.mouse.move(0, 0)
    size = page.viewport_size
    assert size is not None
    clip: FloatRect = {"x": 0, "y": 0, "width": size["width"], "height": size["height"]}
    if until:
        clip["y"] = locate(page, top)[0] - MARGIN if top else 0
        clip["height"] = locate(page, until)[1] + MARGIN - clip["y"]
    picture = Image.open(io.BytesIO(page.screenshot(full_page=bool(until), clip=clip)))
    file = io.BytesIO()
    picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    assert 4_000 < len(file.getvalue()) <= MAX_BYTES
    if ANEW:
        (IMAGES / name).write_bytes(file.getvalue())


def locate(page: Page, selector: str) -> tuple[float, float]:
    """Where the last of these elements begins and ends, in pixels from the page's top."""
    top, bottom = page.locator(selector).last.evaluate(
        "one => { const { top, bottom } = one.getBoundingClientRect(); return [top + scrollY, bottom + scrollY]; }"
    )
    return top, bottom


def shorten(page: Page, tokens: int) -> None:
    """Answers of `tokens` for a picture, of few otherwise."""
    page.get_by_text("System message and sampling").click()
    page.get_by_role("spinbutton", name="Most tokens").fill(str(tokens if ANEW else 3))
    page.get_by_text("System message and sampling").click()


def test_mix_and_side_by_side(page: Page) -> None:
    visit(page, MIX)
    shorten(page, 48)
    page.get_by_role("button", name="An order e-mail").click()
    page.locator(".pane .said").first.wait_for()
    expect(page.locator(".pane[aria-busy=true]")).to_have_count(0)
    take(page, "page-side.png", until=".panes", top="form.card:has(#prompt)")
    page.get_by_label("Shape").first.select_option("fade")
    page.get_by_role("slider", name="from token 8 on").press("PageUp")
    page.get_by_label("Gate").select_option("risk")
    page.get_by_role("region", name="task", exact=True).get_by_label("the gate chooses").check()
    page.locator(".verdict strong").wait_for()
    take(page, "page-mix.png", until=".mixer")
    page.emulate_media(color_scheme="dark")
    take(page, "page-mix-dark.png", until=".mixer")


def test_the_first_minute_on_a_desk_and_on_a_phone(page: Page) -> None:
    visit(page, MIX)
    shorten(page, 40)
    page.evaluate("scrollTo(0, 0)")
    page.set_viewport_size(PHONE)
    take(page, "page-phone.png")
    page.set_viewport_size(DESK)
    page.get_by_role("button", name="See what that does to three prompts").click()
    expect(page.get_by_text("12 answers in")).to_be_in_viewport()
    take(page, "page-first-minute.png", until=".grid", top="#answers")
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.locator(".grid").evaluate("one => one.scrollWidth") <= PHONE["width"], "answers stand below each other"


@pytest.fixture
def measured(http: httpx.Client) -> Iterator[None]:
    """Scorecards with the figures of a recorded sweep, of the adapters that ship."""
    digests = []
    for point in json.loads(MEASURED.read_text())["points"]:
        recipe = point["model"]
        if re.search("-answer|sharp|keen|shuffle", recipe) or "*" not in recipe:
            continue
        digest = http.post("/v1/fusions/plan", json={"fusion": recipe}).raise_for_status().json()["digest"]
        card = {"fusion": recipe, "half_report": point["half_report"]}
        http.post(f"/v1/scorecards/{digest}", json=card).raise_for_status()
        digests.append(digest)
    yield
    for digest in digests:
        http.delete(f"/v1/scorecards/{digest}")


def test_evidence(page: Page, measured: None) -> None:
    visit(page, "#evidence")
    expect(page.locator(".plot").first).to_be_visible()
    take(page, "page-evidence.png", until=".charts")


def test_operate(page: Page) -> None:
    visit(page, "#operate")
    page.get_by_label("Would this recipe answer you?").fill("0.6*task + 0.4*safety")
    expect(page.get_by_text("Allowed; mixed")).to_be_visible()
    expect(page.get_by_role("row", name=re.compile("^task"))).to_be_visible()
    take(page, "page-operate.png", until="section[aria-labelledby=policy]")


def test_blind_vote(page: Page) -> None:
    visit(page, MIX)
    page.get_by_role("tab", name="Blind vote").click()
    page.get_by_label("Tokens of an answer at most").fill("48" if ANEW else "3")
    page.get_by_role("button", name="Ask both").click()
    page.get_by_role("button", name="A is better").wait_for()
    take(page, "page-vote.png", until="main")


def test_every_picture_is_shown_small_and_described() -> None:
    shown: dict[str, str] = {}
    for file in PAGES:
        shown |= {
            name: words for words, name in re.findall(r"!\[([^\]]+)\]\(img/(page[\w-]*\.png)\)", file.read_text())
        }
    made = set(re.findall(r'"(page[\w-]*\.png)"', (ROOT / "tests/page/test_pictures.py").read_text()))
    assert set(shown) == made == {file.name for file in IMAGES.glob("page*.png")}
    assert all(len(words) > 20 for words in shown.values()), "what a picture shows, for those who do not see it"
    assert all((IMAGES / name).stat().st_size <= MAX_BYTES for name in made)
