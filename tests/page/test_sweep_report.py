"""The report of a sweep in a browser: the page's look, and points that open in its mixer."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from eval_clients.answers import Answer, Answers
from eval_clients.endpoint import Plan
from eval_clients.sweeps.points import Point
from eval_clients.sweeps.report import HALVES, TEMPLATE, write_report
from eval_clients.sweeps.sweep import Sweep
from service.routes.page import FOLDER
from tests.conftest import Server
from tests.page.conftest import PHONE, find_violations

MIXES = ("0.4*safety + 0.6*task", "0.2*safety + 0.8*task")


@pytest.fixture
def report(page: Page, shipped: Server, tmp_path: Path) -> Page:
    """A report on two mixes and the base, at an address of the server."""
    points = [Point(model, "sweep", "s", {"l": n / 10}) for n, model in enumerate(MIXES)]
    points.append(Point("smollm2", "control", "base"))
    answers = [
        Answer(point.model, "set", f"{half}{n}", 1, measure, "", half, "p", "a", {"answered": float(n > number)})
        for number, point in enumerate(points)
        for measure in ("harm", "safe")
        for half in HALVES
        for n in range(4)
    ]
    plans = {model: Plan("d" * 64, True, model, 0.0) for model in MIXES}
    write_report(tmp_path, Sweep(points, plans, Answers(answers)), [], title="t", command="c", page=f"{shipped.url}/")
    page.route("**/report.html", lambda route: route.fulfill(path=tmp_path / "report.html"))
    page.goto("/report.html")
    return page


def test_a_point_of_a_report_opens_in_the_mixer(report: Page) -> None:
    expect(report.get_by_role("link", name="smollm2")).to_have_count(0)
    report.get_by_role("link", name=MIXES[1]).last.press("Enter")
    expect(report.get_by_label("Recipe", exact=True)).to_have_value(MIXES[1])


def test_a_report_is_sorted_and_read_without_a_mouse_or_eyes(report: Page) -> None:
    rows = report.locator("#points tbody tr")
    report.get_by_role("button", name="harm", exact=True).press("Enter")
    values = [float(row.locator("td[data-v]").first.get_attribute("data-v") or 0) for row in rows.all()]
    assert values == sorted(values)
    assert len(set(values)) == 3
    expect(report.get_by_role("columnheader", name="harm", exact=True)).to_have_attribute("aria-sort", "ascending")
    report.get_by_role("button", name="Controls").press("Enter")
    expect(rows.filter(has_text="smollm2")).to_be_hidden()
    for scheme in ("light", "dark"):
        report.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]  # one of both
        assert not find_violations(report)
    report.set_viewport_size(PHONE)  # type: ignore[arg-type]  # width and height
    assert report.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_report_has_the_page_s_colors() -> None:
    pattern = re.compile(r"--[a-z-]+: [^;]+;")
    style, *dark = (FOLDER / "style.css").read_text().split("prefers-color-scheme: dark")
    report, *dark_report = TEMPLATE.read_text().split("prefers-color-scheme: dark")
    for ours, its in ((style, report), ("".join(dark), "".join(dark_report))):
        colors = {*pattern.findall(its)}
        assert len(colors) > 10
        assert colors <= {*pattern.findall(ours)}
