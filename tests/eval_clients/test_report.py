"""The report: which point it names, and what it may show."""

from dataclasses import replace
from pathlib import Path

from eval_clients.answers import Answer, Answers, Gap
from eval_clients.sweeps.choice import Limit
from eval_clients.sweeps.points import Point
from eval_clients.sweeps.report import HALVES, HIDDEN, best_point, collect_samples, write_report
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
