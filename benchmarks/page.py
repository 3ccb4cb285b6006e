"""The page's weight and pace: bytes, first paint, and a slider's move to the first new token, against such a request by
curl.

    python -m benchmarks.page --pairs 20

Starts the service with the bundled adapters, and headless Chromium (`chromium` on the path, or CHROMIUM).
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Comparison, Measurement, alternate, record
from benchmarks.servers import ours

COMMAND = "python -m benchmarks.page"
PROMPT = "How do I sharpen a kitchen knife?"
START = "#mix?recipe=0.4*safety+%2B+0.6*task"
TOKENS = 16
LOADS = 5
WAIT_MS, WAIT_S = 120_000, 120
WEIGHTS = [step / 20 for step in range(-40, 41) if step not in (0, 12)]
"""Where a slider can go; every answer has a mix that was not asked before, so that no prompt is in a cache."""
# Notes when a slider moves, and when the mix's pane, cleared then, shows text again.
WATCH = """() => {
  const pane = document.querySelector('#pane-mix').closest('section');
  window.moved = null;
  addEventListener('input', () => { window.moved = performance.now(); window.shown = window.cleared = null; }, true);
  new MutationObserver(() => {
    if (!pane.querySelector('.answer').textContent) window.cleared = true;
    else if (window.cleared && window.shown === null) window.shown = performance.now();
  }).observe(pane, {subtree: true, childList: true, characterData: true});
}"""
SIZES = """['navigation', 'resource'].flatMap((kind) => performance.getEntriesByType(kind))
  .filter((one) => one.name.includes('/page/') || one.entryType === 'navigation')
  .map((one) => [one.decodedBodySize, one.transferSize])"""
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
"""Milliseconds from the navigation's start."""


def time_curl(url: str, body: str) -> float:
    """Milliseconds from curl's request line to the answer's first text, without the start of the process."""
    command = ["curl", "-sNv", "--max-time", str(WAIT_S), "-H", "content-type: application/json", "--data-binary", body]
    began = first = 0.0
    with subprocess.Popen(
        [*command, f"{url}/v1/chat/completions"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as curl:
        assert curl.stdout is not None
        for line in curl.stdout:
            if line.startswith(b"> POST "):
                began = time.perf_counter()
            elif not first and line.startswith(b"data: {") and read_text(line):
                first = time.perf_counter()
    if not (began and first):
        raise RuntimeError(f"curl ended with {curl.returncode} and saw no token of the answer to {body}")
    return (first - began) * 1000


def read_text(line: bytes) -> str:
    """The text of an event of a stream."""
    choices = json.loads(line.removeprefix(b"data: "))["choices"]
    return choices[0]["delta"].get("content") or "" if choices else ""


def time_move(page: Any, weight: float) -> tuple[float, str]:
    """Milliseconds from a slider's move until the page shows the first new token, and the body of its request."""
    with page.expect_request(lambda request: request.url.endswith("/v1/chat/completions")) as caught:
        slider = page.get_by_role("slider", name="Weight of task")
        slider.evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})); }",
            weight,
        )
    took = page.evaluate(  # Playwright's own waiting is `eval`, which the page forbids
        "limit => new Promise((done, fail) => { const look = () => {"
        " if (window.shown) done(window.shown - window.moved);"
        " else if (performance.now() > window.moved + limit) fail(new Error('no new token'));"
        " else setTimeout(look, 5); }; look(); })",
        WAIT_MS,
    )
    page.locator(".pane[aria-busy=true]").first.wait_for(state="hidden", timeout=WAIT_MS)
    return took, caught.value.post_data


def load(browser: Any, url: str) -> tuple[Any, float, list[list[int]]]:
    """The page in a browser that has nothing of it yet, when it painted first, and bytes of its files: whole, sent."""
    page = browser.new_context().new_page()
    page.goto(f"{url}/{START}")
    page.locator(".verdict strong").wait_for(timeout=WAIT_MS)
    return page, page.evaluate(PAINT), page.evaluate(SIZES)


def measure_loads(browser: Any, url: str) -> list[Measurement]:
    """First paint and bytes."""
    paints, sizes = [], []
    for _ in range(LOADS):
        page, paint, files = load(browser, url)
        page.context.close()
        paints.append(paint / 1000)
        sizes.append(files)
    whole = tuple(sum(plain for plain, _ in files) / 1024 for files in sizes)
    sent = tuple(sum(size for _, size in files) / 1024 for files in sizes)
    note = f"{len(sizes[0])} files, {whole[0]:.0f} KiB unpacked, each load with an empty cache"
    return [
        Measurement("the page's first paint", "s", 1, tuple(paints), note=note),
        Measurement("the page, as it is sent", "KiB", 300, sent),
    ]


def measure_moves(browser: Any, url: str, pairs: int) -> Comparison:
    """A slider's move to the first new token on the page, and curl's request for another mix of the same adapters."""
    page, _, _ = load(browser, url)
    page.get_by_text("System message and sampling").click()
    page.get_by_role("spinbutton", name="Most tokens").fill(str(TOKENS))
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Ask all", exact=True).click()
    page.locator(".pane .said").first.wait_for(timeout=WAIT_MS)
    page.locator(".pane[aria-busy=true]").first.wait_for(state="hidden", timeout=WAIT_MS)
    page.evaluate(WATCH)
    bodies = []
    weights = iter(random.Random(0).sample(WEIGHTS, len(WEIGHTS)))

    def move() -> float:
        took, body = time_move(page, next(weights))
        bodies.append(json.loads(body))
        return took

    def curl() -> float:
        other = f"0.4*safety + {next(weights) + 0.025:g}*task"
        return time_curl(url, json.dumps({**bodies[-1], "fusion": other}))

    sides = alternate(move, curl, pairs)
    page.context.close()
    name, ours_is, peer_is = "slider moved to first new token", "the page, shown", "curl, received"
    note = "no mix is asked twice: no answer's prompt is cached"
    return Comparison(name, ours_is, peer_is, "ms", ("<=", 1.2), **sides, note=note)


def run(url: str, pairs: int, chromium: str) -> list[Comparison | Measurement]:
    """All figures of the service at `url`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        return [*measure_loads(browser, url), measure_moves(browser, url, pairs)]


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, choices=range(1, len(WEIGHTS) // 2), metavar="N")
    parser.add_argument("--url", help="a running service, instead of one that is started; nothing is recorded then")
    flags = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        parser.error("chromium is not on the path: `make debian` installs it, or set CHROMIUM")
    if flags.url:
        for row in run(flags.url, flags.pairs, chromium):
            print(row.line())
        return
    shipped = ROOT / "examples/adapters"
    adapters = ",".join(f"{name}={shipped / name}" for name in ("task", "safety", "risk"))
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"FUSION_ADAPTERS": adapters, "FUSION_PROFILES": "", "FUSION_ADAPTER_ROOTS": str(shipped)}
        with ours([], Path(scratch), **settings) as server:
            rows = run(server.url, flags.pairs, chromium)
    record("page.json", f"{COMMAND} --pairs {flags.pairs}", rows)


if __name__ == "__main__":
    main()
