"""The report of a sweep: one HTML page with its pictures and tables inside, and the same as PNG, CSV and JSON.

Answers to harmful prompts are only shown when they are refusals: a report is passed around.
"""

import base64
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from eval_clients.results import Line, Row, columns, write
from eval_clients.shares import Share
from eval_clients.sweeps.choice import Cliff, Limit, best, cliffs, front
from eval_clients.sweeps.points import Point
from eval_clients.sweeps.sweep import Sweep
from eval_clients.tasks.data import Half

CURVES = {
    "harm": ("harmful prompts answered", "#b3261e"),
    "safe_answered": ("safe prompts answered", "#1b6e3c"),
    "degenerate": ("safe prompts: degenerate", "#8a6d00"),
    "task": ("task exact", "#1f4e99"),
    "mmlu": ("MMLU", "#6b3fa0"),
}
NAMED = {"base", "single adapter"}
"""Controls whose names stand in the picture; the others lie close together."""
MARKS = {"sweep": "o", "search": "D", "control": "x"}
SAMPLES = 6
HALVES: tuple[Half, ...] = ("choose", "report")
HIDDEN = "(an answer to a harmful prompt, not shown)"
TEMPLATE = Path(__file__).parent / "report.html.j2"


def _errors(share: Share) -> tuple[float, float]:
    return share.value - share.low, share.high - share.value


def curves(found: Sweep, path: Path) -> None:
    """Every measure along each one-variable series, with 95 % bands and the cliffs marked."""
    lines = found.lines()
    series: dict[str, list[Point]] = {}
    for point in found.points:
        if point.kind == "sweep" and len(point.values) == 1 and point.model in lines:
            series.setdefault(point.series, []).append(point)
    series = {name: members for name, members in series.items() if len(members) > 1}
    count = max(1, len(series))
    figure, axes = plt.subplots(1, count, figsize=(6.4 * count, 4.4), squeeze=False, sharey=True)
    steep = cliffs(found.points, lines)
    for axis, (name, members) in zip(axes[0], series.items(), strict=False):
        members = sorted(members, key=lambda point: next(iter(point.values.values())))
        at = [next(iter(point.values.values())) for point in members]
        for key, (label, colour) in CURVES.items():
            shares = [lines[point.model].shares.get(key) for point in members]
            known = [(x, share) for x, share in zip(at, shares, strict=True) if share is not None]
            if known:
                xs, values = [x for x, _ in known], [share for _, share in known]
                axis.plot(xs, [v.value for v in values], "o-", color=colour, label=label, markersize=3)
                axis.fill_between(xs, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.12)
        for cliff in steep:
            if cliff.before.series == name:
                ends = [next(iter(p.values.values())) for p in (cliff.before, cliff.after)]
                axis.axvspan(*ends, color=CURVES[cliff.measure][1], alpha=0.12, hatch="//")
        axis.set(title=name, xlabel=next(iter(members[0].values)), ylim=(-0.02, 1.02))
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("share of prompts, 95 % band")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def pareto(found: Sweep, path: Path, winner: str) -> None:
    """Harm against answers to safe prompts, the task's score as colour, the front ringed, intervals as bars."""
    lines = {m: x for m, x in found.lines().items() if "harm" in x.shares and "safe_answered" in x.shares}
    figure, axis = plt.subplots(figsize=(7.6, 5.6))
    best_points = set(front({m: line for m, line in found.candidates().items() if m in lines}))
    mesh = None
    for point in found.points:
        if point.model not in lines:
            continue
        x, y = lines[point.model].shares["harm"], lines[point.model].shares["safe_answered"]
        job = lines[point.model]["task"]
        xerr, yerr = ([[e] for e in _errors(share)] for share in (x, y))
        axis.errorbar(x.value, y.value, xerr=xerr, yerr=yerr, fmt="none", ecolor="#999999", alpha=0.35, lw=0.8)
        mark: dict[str, Any] = {"marker": MARKS[point.kind], "s": 46, "cmap": "viridis", "vmin": 0, "vmax": 1}
        if point.model in best_points and point.kind != "control":
            mark |= {"edgecolors": "black", "linewidths": 1.3}
        mesh = axis.scatter([x.value], [y.value], c=[0.5 if job is None else job.value], zorder=3, **mark)
        if point.series in NAMED or point.model == winner:
            left = x.value < 0.5
            offset = (26 if left else -26, 26 if point.model == winner else -26)  # where fewer points lie
            text: dict[str, Any] = {"fontsize": 6.5, "ha": "left" if left else "right", "zorder": 5}
            text |= {"bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}}
            text |= {"textcoords": "offset points", "arrowprops": {"arrowstyle": "-", "lw": 0.7}}
            axis.annotate(point.model, (x.value, y.value), xytext=offset, **text)
    if mesh is not None:
        figure.colorbar(mesh, ax=axis, label="task exact")
    axis.set(xlabel="harmful prompts answered (less is better)", ylabel="safe prompts answered (more is better)")
    axis.set_title("o sweep   ◇ search   × control   ringed: no other is better in every aim", fontsize=9)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def beside(
    rows: Sequence[Row], models: Sequence[str], quoted: Collection[str] | None = None, count: int = SAMPLES
) -> list[dict[str, Any]]:
    """For some prompts of each measure, the answers of `models` side by side; answers that could harm are hidden, and
    so is every prompt of a task that is not among the `quoted`.
    """
    by_prompt: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        if quoted is not None and row.task not in quoted:
            continue
        if row.model in models and row.seed == 1 and row.measure in ("harm", "safe", "task"):
            harmless = row.measure != "harm" or row.scores.get("refused", 0) > row.scores.get("partial", 0)
            shown = row.answer if harmless else HIDDEN
            by_prompt.setdefault((row.measure, row.sample, row.prompt), {})[row.model] = shown
    found: list[dict[str, Any]] = []
    for kind in ("safe", "harm", "task"):
        full = [item for item in by_prompt.items() if item[0][0] == kind and len(item[1]) == len(models)]
        for (measure_, _, prompt), answers in full[:: max(1, len(full) // count)][:count]:
            found.append({"measure": measure_, "prompt": prompt, "answers": [answers[m] for m in models]})
    return found


def described(cliff: Cliff) -> str:
    """A sentence about a cliff."""
    label = CURVES[cliff.measure][0]
    change = f"{'fall' if cliff.change < 0 else 'rise'} by {abs(100 * cliff.change):.0f} points"
    return f"{label} {change} between {cliff.before.model} and {cliff.after.model}"


def verdict(found: Sweep, limits: Sequence[Limit]) -> dict[str, Any]:
    """The best point: chosen on one half of every set, with its measures on the other. ValueError when no point was
    measured.
    """
    chosen_on, shown_on = found.candidates("choose"), found.lines("report")
    ours = {point.model for point in found.points if point.kind != "control"}
    winner, missed = best({m: line for m, line in chosen_on.items() if m in ours}, limits, chosen_on)
    kept = {str(limit): limit.missed(shown_on[winner], shown_on) == 0 for limit in limits} if winner in shown_on else {}
    return {
        "best": winner,
        "limits": [str(limit) for limit in limits],
        "kept_where_chosen": missed == 0,
        "kept_on_the_other_half": kept,
        "chosen_on": chosen_on[winner].to_json(),
        "reported_on": shown_on[winner].to_json() if winner in shown_on else {},
    }


def make(
    folder: Path,
    found: Sweep,
    limits: Sequence[Limit],
    *,
    title: str,
    command: str,
    about: Sequence[str] = (),
    quoted: Collection[str] | None = None,
) -> dict[str, Any]:
    """Writes report.html, curves.png, pareto.png, report.json and the results' files; returns the verdict. Sample
    answers are those of the `quoted` tasks only, when given: a report that goes public must not hold a private set.
    """
    result = verdict(found, limits)
    lines = found.lines()
    halves = {half: found.lines(half) for half in HALVES}
    measured = [point for point in found.points if point.model in lines]
    write(folder, found.answers)
    curves(found, folder / "curves.png")
    pareto(found, folder / "pareto.png", result["best"])
    names = columns(lines.values())
    shown = list(dict.fromkeys([*[point.model for point in measured if point.kind == "control"][:3], result["best"]]))
    steep = [described(cliff) for cliff in cliffs(found.points, lines)]
    leading = [m for m in front(found.candidates()) if any(p.model == m and p.kind != "control" for p in measured)]
    body = {
        "title": title,
        "command": command,
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "about": [*about, *found.notes],
        "verdict": result,
        "cliffs": steep,
        "front": leading,
        "missing": [list(one) for one in found.answers.missing],
        "unscored": [list(one) for one in found.answers.unscored],
    }
    page = body | {
        "winner": halves["report"].get(result["best"]),
        "columns": names,
        "rows": [_table_row(point, lines[point.model], found, names) for point in measured],
        "models": shown,
        "samples": beside(found.answers.rows, shown, quoted),
        "pictures": {n: base64.b64encode((folder / f"{n}.png").read_bytes()).decode() for n in ("pareto", "curves")},
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page)
    (folder / "report.html").write_text(html, encoding="utf-8")
    points = [
        asdict(point)
        | {"all": lines[point.model].to_json()}
        | {f"half_{half}": found_[point.model].to_json() for half, found_ in halves.items() if point.model in found_}
        for point in measured
    ]
    text = json.dumps(body | {"points": points}, indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    return result


def _table_row(point: Point, line: Line, found: Sweep, names: Sequence[str]) -> dict[str, Any]:
    plan = found.plans.get(point.model)
    how = "" if plan is None else "mixed" if plan.mixed else f"built, error {plan.error:.3g}"
    cells = [{"text": "" if (m := line[n]) is None else str(m), "value": -1 if m is None else m.value} for n in names]
    return {"model": point.model, "kind": point.kind, "series": point.series, "how": how, "cells": cells}
