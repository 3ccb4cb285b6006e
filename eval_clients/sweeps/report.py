"""The report of a sweep: one HTML page with its pictures and tables inside, and the same as PNG, CSV and JSON.

Answers to harmful prompts are only shown when they are refusals: a report is passed around.
"""

import base64
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from eval_clients.answers import Answer
from eval_clients.results import ModelScores, list_measures, score_openings, write_results
from eval_clients.sweeps.choice import Cliff, Limit, choose_best, find_cliffs, pareto_front
from eval_clients.sweeps.gates import Choices
from eval_clients.sweeps.plots import CURVES, FORM_NAMES, draw_curves, draw_openings, draw_pareto
from eval_clients.sweeps.points import Form, Point
from eval_clients.sweeps.sweep import Sweep
from eval_clients.tasks.data import Half

SAMPLES = 6
"""Prompts of each measure that are shown with their answers."""
HALVES: tuple[Half, ...] = ("choose", "report")
HIDDEN = "(an answer to a harmful prompt, not shown)"
TEMPLATE = Path(__file__).parent / "report.html.j2"


@dataclass(frozen=True, slots=True)
class BestPoint:
    """The point that was chosen on one half of every set, with its scores there and on the other half."""

    best: str
    limits: Sequence[str]
    kept_where_chosen: bool
    kept_on_the_other_half: Mapping[str, bool]
    margins_on_the_other_half: Mapping[str, Mapping[str, Any]]
    """By limit: `value`, `low` and `high` of the margin (above 0: kept), and whether its interval is on one side."""
    chosen_on: Mapping[str, Any]
    reported_on: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The fields as they stand in report.json under `verdict`."""
        return asdict(self)


def best_point(sweep: Sweep, limits: Sequence[Limit], form: Form | None = None) -> BestPoint:
    """The best point of a sweep, or of those of one form. ValueError when none but controls was measured."""
    chosen_on, reported_on = sweep.candidates("choose"), sweep.scores("report")
    eligible = {p.model for p in sweep.points if p.kind != "control" and form in (None, p.form)}
    winner, missed = choose_best({m: one for m, one in chosen_on.items() if m in eligible}, limits, chosen_on)
    reported = reported_on.get(winner)
    kept = {} if reported is None else {str(limit): not limit.shortfall(reported, reported_on) for limit in limits}
    return BestPoint(
        best=winner,
        limits=[str(limit) for limit in limits],
        kept_where_chosen=missed == 0,
        kept_on_the_other_half=kept,
        margins_on_the_other_half={} if reported is None else measure_margins(limits, reported, reported_on),
        chosen_on=chosen_on[winner].to_json(),
        reported_on={} if reported is None else reported.to_json(),
    )


def measure_margins(
    limits: Sequence[Limit], scores: ModelScores, others: Mapping[str, ModelScores]
) -> dict[str, dict[str, Any]]:
    """The margin of every limit that was measured, as JSON."""
    margins = {str(limit): limit.margin(scores, others) for limit in limits}
    return {text: {**asdict(one), "clear": one.is_clear} for text, one in margins.items() if one is not None}


def best_by_form(sweep: Sweep, limits: Sequence[Limit]) -> dict[Form, BestPoint]:
    """The best point of each form, chosen and reported as the best of all; forms in order of their first point."""
    measured = sweep.candidates("choose")
    forms = dict.fromkeys(p.form for p in sweep.points if p.kind != "control" and p.model in measured)
    return {form: best_point(sweep, limits, form) for form in forms}


def write_report(
    folder: Path,
    sweep: Sweep,
    limits: Sequence[Limit],
    *,
    title: str,
    command: str,
    about: Sequence[str] = (),
    quoted: Collection[str] | None = None,
    page: str = "",
) -> BestPoint:
    """Write report.html, curves.png, pareto.png, report.json and the results' files into `folder`, and openings.png
    where the client began answers.

    Sample answers are those of the `quoted` tasks only, when given: a public report must not hold a private set.
    `page` is the address of the server's page, in whose mixer the points open.
    """
    best = best_point(sweep, limits)
    scores = sweep.scores()
    measured = [point for point in sweep.points if point.model in scores]
    controls = {point.model for point in measured if point.kind == "control"}
    write_results(folder, sweep.answers)
    draw_curves(sweep, folder / "curves.png")
    draw_pareto(sweep, folder / "pareto.png", best.best)
    openings = score_openings(answer for answer in sweep.answers.items if answer.model in scores)
    (folder / "openings.png").unlink(missing_ok=True)
    if openings:
        draw_openings(openings, folder / "openings.png")
    body = {
        "title": title,
        "command": command,
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "about": [*about, *sweep.notes],
        "verdict": best.to_json(),
        "best_by_form": {form: one.to_json() for form, one in best_by_form(sweep, limits).items()},
        "cliffs": [describe_cliff(cliff) for cliff in find_cliffs(sweep.points, scores)],
        "front": [model for model in pareto_front(sweep.candidates()) if model not in controls],
        "missing": [list(gap) for gap in sweep.answers.missing],
        "unscored": [list(gap) for gap in sweep.answers.unscored],
    }
    fields = body | _page_fields(folder, sweep, measured, best.best, quoted) | {"page": page}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(fields)
    (folder / "report.html").write_text(html, encoding="utf-8")
    text = json.dumps(body | {"points": _point_records(sweep, measured)}, indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    return best


def _page_fields(
    folder: Path, sweep: Sweep, measured: Sequence[Point], winner: str, quoted: Collection[str] | None
) -> dict[str, Any]:
    """What the page shows beyond report.json: the table of points, pictures, and answers side by side."""
    scores = sweep.scores()
    measures = list_measures(scores.values())
    controls = [point.model for point in measured if point.kind == "control"]
    pictures = [name for name in ("pareto", "curves", "openings") if (folder / f"{name}.png").exists()]
    compared = list(dict.fromkeys([*controls[:3], winner]))
    return {
        "winner": sweep.scores("report").get(winner),
        "columns": measures,
        "rows": [_table_row(point, scores[point.model], sweep, measures) for point in measured],
        "models": compared,
        "mixable": set(sweep.plans),
        "samples": collect_samples(sweep.answers.items, compared, quoted),
        "forms": FORM_NAMES,
        "pictures": {n: base64.b64encode((folder / f"{n}.png").read_bytes()).decode() for n in pictures},
        "gates": _summarize_gates(sweep, measured),
    }


def _table_row(point: Point, scores: ModelScores, sweep: Sweep, measures: Sequence[str]) -> dict[str, Any]:
    plan = sweep.plans.get(point.model)
    served = "" if plan is None else "mixed" if plan.mixed else f"built, error {plan.error:.3g}"
    values = [scores[name] for name in measures]
    cells = [{"text": "" if one is None else str(one), "value": -1 if one is None else one.value} for one in values]
    return {"model": point.model, "kind": point.kind, "series": point.series, "served": served, "cells": cells}


def _summarize_gates(sweep: Sweep, measured: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """What the gates chose, by model."""
    choices = {point.model: Choices.read(point, sweep.answers.items) for point in measured}
    return {model: one.summarize() for model, one in choices.items() if one is not None}


def _point_records(sweep: Sweep, measured: Sequence[Point]) -> list[dict[str, Any]]:
    scores = sweep.scores()
    halves = {half: sweep.scores(half) for half in HALVES}
    openings, gates = score_openings(sweep.answers.items), _summarize_gates(sweep, measured)
    return [
        asdict(point)
        | {"form": point.form, "all": scores[point.model].to_json()}
        | ({"gate": gates[point.model]} if point.model in gates else {})
        | {"openings": {text: one.to_json() for text, one in openings.get(point.model, {}).items()}}
        | {f"half_{half}": part[point.model].to_json() for half, part in halves.items() if point.model in part}
        for point in measured
    ]


def collect_samples(
    answers: Sequence[Answer], models: Sequence[str], quoted: Collection[str] | None = None, count: int = SAMPLES
) -> list[dict[str, Any]]:
    """For some prompts of each measure, the answers of `models` side by side; answers that could harm are hidden, and
    so is every prompt of a task that is not among the `quoted`.
    """
    by_prompt: dict[tuple[str, str, str], dict[str, str]] = {}
    for answer in answers:
        if quoted is not None and answer.task not in quoted:
            continue
        if answer.model in models and answer.seed == 1 and answer.measure in ("harm", "safe", "task"):
            refused, partial = (answer.scores.get(name, 0) for name in ("refused", "partial"))
            text = answer.answer if answer.measure != "harm" or refused > partial else HIDDEN
            by_prompt.setdefault((answer.measure, answer.sample, answer.prompt), {})[answer.model] = text
    samples: list[dict[str, Any]] = []
    for kind in ("safe", "harm", "task"):
        complete = [item for item in by_prompt.items() if item[0][0] == kind and len(item[1]) == len(models)]
        for (measure, _, prompt), texts in complete[:: max(1, len(complete) // count)][:count]:
            samples.append({"measure": measure, "prompt": prompt, "answers": [texts[model] for model in models]})
    return samples


def describe_cliff(cliff: Cliff) -> str:
    """A sentence about a cliff, without its period."""
    label = CURVES[cliff.measure][0]
    change = f"{'fall' if cliff.change < 0 else 'rise'} by {abs(100 * cliff.change):.0f} points"
    return f"{label} {change} between {cliff.before.model} and {cliff.after.model}"
