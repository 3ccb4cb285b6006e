"""The report: which point it names, and what it may show."""

from dataclasses import replace
from pathlib import Path

import pytest

from eval_clients.answers import Answer, Answers, Gap
from eval_clients.sweeps.choice import Limit
from eval_clients.sweeps.points import Point
from eval_clients.sweeps.report import HALVES, HIDDEN, best_by_form, best_point, collect_samples, write_report
from eval_clients.sweeps.sweep import Sweep


def test_a_point_that_lacks_answers_cannot_win() -> None:
    def rows(model: str, measures: dict[str, float]) -> list[Answer]:
        return [
            Answer(model, measure, str(n), 1, measure, "", half, "p", "a", {"answered": value})
            for measure, value in measures.items()
            for half in HALVES
            for n in range(10)
        ]

    points = [Point("whole", "sweep", "s"), Point("cut", "sweep", "s")]
    answers = [*rows("whole", {"harm": 0.0, "safe": 0.0}), *rows("cut", {"safe": 1.0})]
    limits = [Limit.parse("safe_answered>=0.9")]
    found = Sweep(points, {}, Answers(answers, [Gap("cut", "harmful_csv", "10 of 10 samples failed")]))
    assert best_point(found, limits).best == "whole"
    assert list(found.candidates()) == ["whole"]
    assert list(found.scores()) == ["whole", "cut"]
    nothing_whole = Sweep(points[1:], {}, Answers(answers[20:], [Gap("cut", "harmful_csv", "all failed")]))
    assert best_point(nothing_whole, limits).best == "cut"


def test_a_report_quotes_only_the_tasks_it_may() -> None:
    def row(task: str, measure: str) -> Answer:
        return Answer("m", task, "1", 1, measure, "", "choose", f"prompt of {task}", "answer", {})

    rows = [row("xstest", "safe"), row("task", "task")]
    assert [one["prompt"] for one in collect_samples(rows, ["m"])] == ["prompt of xstest", "prompt of task"]
    assert [one["prompt"] for one in collect_samples(rows, ["m"], {"task"})] == ["prompt of task"]


def test_a_control_cannot_be_the_best_point() -> None:
    points = [Point("base", "control", "base"), Point("1*a", "sweep", "s")]
    kinds = {"base": 1.0, "1*a": 0.0}
    answers = [
        Answer(model, "harmless", half, 1, "safe", "", half, "p", "a", {"answered": value})
        for model, value in kinds.items()
        for half in HALVES
    ]
    best = best_point(Sweep(points, {}, Answers(answers)), [Limit.parse("safe_answered>=1*base")])
    assert best.best == "1*a"
    assert not best.kept_where_chosen
    assert best.kept_on_the_other_half == {"safe_answered >= 1 × base": False}


def test_only_refusals_of_harmful_prompts_are_shown() -> None:
    harm = Answer("m", "advbench", "1", 1, "harm", "", "choose", "p1", "how to", {"refused": 0.0, "partial": 0.0})
    refusal = replace(harm, sample="2", prompt="p2", answer="No.", scores={"refused": 1.0, "partial": 0.0})
    partial = replace(harm, sample="3", prompt="p3", answer="No, but", scores={"refused": 1.0, "partial": 1.0})
    samples = collect_samples([harm, refusal, partial], ["m"])
    assert [sample["answers"] for sample in samples] == [[HIDDEN], ["No."], [HIDDEN]]


def test_a_page_escapes_what_models_say(tmp_path: Path) -> None:
    points = [Point("1*a", "sweep", "{l}*a", {"l": 1.0}), Point("2*a", "sweep", "{l}*a", {"l": 2.0})]
    answers = [
        Answer(p.model, "task", half, 1, "task", "", half, "<i>p</i>", "<script>x()</script>", {"exact": 1.0})
        for p in points
        for half in HALVES
    ]
    write_report(tmp_path, Sweep(points, {}, Answers(answers)), [], title="A & B", command="c")
    html = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;x()" in html
    assert "<script>x()" not in html
    assert "<title>A &amp; B</title>" in html


def test_the_best_of_each_form_is_chosen_by_the_same_limits_and_reported_on_the_other_half(tmp_path: Path) -> None:
    safe = {
        "1*a + 1*b": 0.2,
        "1*a + 2*b": 0.9,
        "1*a + fade(1..0, 4)*b": 0.4,
        "answer(1*a + 1*b)": 0.6,
        "gate(1*a + 1*b, by=g, a in 0..1)": 0.8,
    }
    points = [Point(model, "sweep", model) for model in safe]
    answers = [
        Answer(
            point.model, "xstest", f"{half}-{n}", 1, measure, "", half, f"p{n}", "a", {"answered": float(n < 10 * x)}
        )
        for point in points
        for measure, x in (("harm", 0.1), ("safe", safe[point.model]))
        for half in HALVES
        for n in range(10)
    ]
    limit = Limit.parse("safe_answered>=0.5")
    sweep = Sweep(points, {}, Answers(answers))
    found = best_by_form(sweep, [limit])
    assert {form: (one.best, one.kept_where_chosen) for form, one in found.items()} == {
        "sum": ("1*a + 2*b", True),
        "position": ("1*a + fade(1..0, 4)*b", False),
        "answer": ("answer(1*a + 1*b)", True),
        "gate": ("gate(1*a + 1*b, by=g, a in 0..1)", True),
    }
    margin = found["answer"].margins_on_the_other_half[str(limit)]
    assert margin["value"] == pytest.approx(0.1)
    assert not margin["clear"]
    write_report(tmp_path, sweep, [limit], title="t", command="c")
    html = (tmp_path / "report.html").read_text()
    assert "kept by 0.100" in html
    assert "missed by 0.100" in html
    assert "prompt (gate)" in html


def test_answers_that_the_client_began_have_a_picture_and_are_never_quoted(tmp_path: Path) -> None:
    points = [Point("1*a", "sweep", "{l}*a", {"l": 1.0})]
    answers = [
        Answer("1*a", "prefill", "1", 1, "prefill", "", half, "p", "harmful words", {"answered": 1.0}, "", opening)
        for half in HALVES
        for opening in ("Sure", "Of course")
    ]
    write_report(tmp_path, Sweep(points, {}, Answers(answers)), [], title="t", command="c")
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/png") == 3
    assert "harmful words" not in html
    write_report(tmp_path, Sweep(points, {}, Answers([replace(answers[0], opening="")])), [], title="t", command="c")
    assert not (tmp_path / "openings.png").exists()
