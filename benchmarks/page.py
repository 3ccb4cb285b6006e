"""The page's weight and pace: bytes, first paint, and a slider's move to the first new token against the same request
made by curl, in alternating pairs.

    python -m benchmarks.page --pairs 20 --out page.json

Starts the service with the bundled adapters, and headless Chromium (`chromium` on the path, or CHROMIUM).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.servers import ours

PROMPT = "How do I sharpen a kitchen knife?"
START = "#mix?recipe=0.4*safety+%2B+0.6*task"
TOKENS = 16
WAIT_MS = 120_000
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


def time_curl(url: str, body: str) -> float:
    """Milliseconds from curl's start of the request to the answer's first token, without the start of the process."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(body)
        file.flush()
        command = ["curl", "-sN", "--trace-time", "--trace-ascii", "-", "-o", os.devnull]
        command += ["-H", "content-type: application/json", "--data-binary", f"@{file.name}"]
        done = subprocess.run([*command, f"{url}/v1/chat/completions"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    began = next(read_time(line) for line in lines if "=> Send header" in line)
    marks = [index for index, line in enumerate(lines) if "<= Recv data" in line]
    for index in marks:
        following = "".join(lines[index : index + 40])
        if '"content":"' in following and '"content":""' not in following.split("<= Recv data")[1]:
            return (read_time(lines[index]) - began) * 1000
    raise ValueError(f"curl saw no token: {done.stdout[-500:]}")


def read_time(line: str) -> float:
    """Seconds of the day at which curl wrote a line of its trace."""
    hours, minutes, seconds = line.split(" ")[0].split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def time_move(page: Any, weight: float) -> tuple[float, str]:
    """Milliseconds from a slider's move until the page shows the first new token, and the request's body."""
    with page.expect_request(lambda request: request.url.endswith("/v1/chat/completions")) as caught:
        slider = page.get_by_role("slider", name="Weight of task")
        slider.evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})); }",
            weight,
        )
    took = page.evaluate(  # Playwright's own waiting is `eval`, which the page forbids
        "new Promise((done) => { const look = () => (window.shown ? done(window.shown - window.moved)"
        " : setTimeout(look, 5)); look(); })"
    )
    page.locator(".pane[aria-busy=true]").first.wait_for(state="hidden", timeout=WAIT_MS)
    return took, caught.value.post_data


def measure(page: Any, url: str, pairs: int) -> dict[str, Any]:
    """All figures of one browser."""
    page.goto(f"{url}/{START}")
    page.locator(".verdict strong").wait_for(timeout=WAIT_MS)
    paints = []
    for _ in range(5):
        page.reload()
        page.locator(".verdict strong").wait_for(timeout=WAIT_MS)
        paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    sizes = page.evaluate("performance.getEntriesByType('resource').filter(e => e.name.includes('/page/'))"
                          ".map(e => [e.decodedBodySize, e.encodedBodySize])")  # fmt: skip
    page.get_by_text("System message and sampling").click()
    page.get_by_role("spinbutton", name="Most tokens").fill(str(TOKENS))
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Ask all", exact=True).click()
    page.locator(".pane .said").first.wait_for(timeout=WAIT_MS)
    page.locator(".pane[aria-busy=true]").first.wait_for(state="hidden", timeout=WAIT_MS)
    page.evaluate(WATCH)
    rows = []
    for index in range(pairs):
        weight = round(0.65 + 0.05 * (index % 20), 2)
        moved, body = time_move(page, weight)
        rows.append({"move_ms": moved, "curl_ms": time_curl(url, body)})
    ratios = [row["move_ms"] / row["curl_ms"] for row in rows]
    return {
        "first_paint_ms": statistics.median(paints),
        "files": len(sizes) + 1,
        "bytes": sum(plain for plain, _ in sizes),
        "bytes_sent": sum(sent for _, sent in sizes),
        "ratio": statistics.median(ratios),
        "pairs": rows,
    }


def main() -> None:
    """Measure, print the medians, and write everything."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--url", help="a running service, instead of one that is started")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    flags = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        parser.error("chromium is not on the path: `make debian` installs it, or set CHROMIUM")

    def run(url: str) -> dict[str, Any]:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            return measure(browser.new_page(), url, flags.pairs)

    if flags.url:
        figures = run(flags.url)
    else:
        shipped = Path(__file__).resolve().parents[1] / "examples/adapters"
        adapters = ",".join(f"{name}={shipped / name}" for name in ("task", "safety", "risk"))
        with tempfile.TemporaryDirectory() as scratch:
            settings = {"FUSION_ADAPTERS": adapters, "FUSION_PROFILES": "", "FUSION_ADAPTER_ROOTS": str(shipped)}
            with ours([], Path(scratch), **settings) as server:
                figures = run(server.url)
    print(json.dumps({key: value for key, value in figures.items() if key != "pairs"}, indent=1))
    if flags.out:
        flags.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
