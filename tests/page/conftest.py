"""A real browser before the shared server: Debian's Chromium, driven by Playwright.

Every page is watched: an error in its console, and a request to another origin, fail the test.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, ViewportSize, expect, sync_playwright

from tests.conftest import ROOT, Server

AXE = ROOT / ".cache/clients/node/node_modules/axe-core/axe.min.js"
"""Which `make test` installs by tests/clients/node/package-lock.json."""
SHIPPED = ("task", "safety", "risk")
MIX = "#mix?recipe=0.6*task+%2B+0.4*safety"
LIMIT_MS = 60_000
expect.set_options(timeout=LIMIT_MS)
PHONE: ViewportSize = {"width": 360, "height": 740}


@contextmanager
def run_browser() -> Iterator[Browser]:
    """Chromium, headless, for the block."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert path, "the page's tests need Chromium: `make debian` installs Debian's package, or set CHROMIUM to another"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """A browser that ends with the tests of this folder: its loop would be in the way of others'."""
    with run_browser() as browser:
        yield browser


@pytest.fixture(scope="package")
def shipped(server: Server) -> Iterator[Server]:
    """The shared server with the adapters of a fresh `make serve`, which leave with the tests of this folder."""
    with server.http() as http:
        answers = {}
        for name in SHIPPED:
            body = {"name": name, "path": str(ROOT / "examples/adapters" / name)}
            answers[name] = http.post("/v1/adapters", json=body)
        assert {answer.status_code for answer in answers.values()} <= {200, 201}
        yield server
        for name, answer in answers.items():
            if answer.status_code == 201:
                assert http.delete(f"/v1/adapters/{name}").status_code == 204


@dataclass
class Watch:
    """What a page did that it must not do."""

    origin: str
    faults: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    """Parts of console errors that the test provokes: Chromium logs every answer that is an error."""

    def attach(self, page: Page) -> None:
        page.on("console", lambda said: self.note(f"console: {said.text}") if said.type == "error" else None)
        page.on("pageerror", lambda error: self.note(f"error: {error}"))
        page.context.on("request", lambda request: self.check(request.url))

    def note(self, fault: str) -> None:
        if not any(part in fault for part in self.expected):
            self.faults.append(fault)

    def check(self, url: str) -> None:
        if not url.startswith((f"{self.origin}/", "data:", "blob:")):
            self.faults.append(f"request: {url}")


def open_page(browser: Browser, url: str, **options: Any) -> Iterator[tuple[Page, Watch]]:
    """A page of a context of its own, at no address yet."""
    context = browser.new_context(base_url=url, **options)
    context.set_default_timeout(LIMIT_MS)
    page, watch = context.new_page(), Watch(url)
    watch.attach(page)
    yield page, watch
    context.close()
    assert not watch.faults


@pytest.fixture
def watched(browser: Browser, shipped: Server) -> Iterator[tuple[Page, Watch]]:
    yield from open_page(browser, shipped.url)


def visit(page: Page, fragment: str = "") -> None:
    """Open the page at a fragment, as a link does, and wait until it shows what the server has."""
    page.goto("about:blank")
    page.goto(f"/{fragment}")
    page.get_by_role("tab", name="Mix").wait_for()
    if fragment.startswith("#mix"):
        page.locator(".verdict strong").wait_for()  # the server has parsed the recipe


@pytest.fixture
def page(watched: tuple[Page, Watch]) -> Page:
    """The page on a desk, with a mix of two adapters."""
    page = watched[0]
    visit(page, MIX)
    return page


@pytest.fixture
def http(shipped: Server) -> Iterator[httpx.Client]:
    with shipped.http() as client:
        yield client


def find_violations(page: Page) -> list[str]:
    """What axe-core finds that is serious or critical, as `rule: elements`."""
    assert AXE.exists(), "run `make test`, which installs axe-core from tests/clients/node"
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {', '.join(str(node['target']) for node in one['nodes'])}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def change_headers(route: Route, **headers: str) -> None:
    """Let the server answer, with other headers (`x_fusion_mode` is `x-fusion-mode`)."""
    answer = route.fetch()
    other = {name.replace("_", "-"): value for name, value in headers.items()}
    route.fulfill(response=answer, headers=answer.headers | other)
