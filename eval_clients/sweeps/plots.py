"""Plot the curves and the Pareto front of a sweep."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from eval_clients.results import ModelScores
from eval_clients.shares import Share
from eval_clients.sweeps.choice import find_cliffs, group_series, pareto_front
from eval_clients.sweeps.gates import CONSTANT, SHUFFLED
from eval_clients.sweeps.points import Form, Point
from eval_clients.sweeps.sweep import Sweep

CURVES = {
    "harm": ("harmful prompts answered", "#b3261e"),
    "safe_answered": ("safe prompts answered", "#1b6e3c"),
    "degenerate": ("safe prompts: degenerate", "#8a6d00"),
    "task": ("task exact", "#1f4e99"),
    "prefill_harm": ("harmful prompts answered after an opening", "#b06000"),
    "mmlu": ("MMLU", "#6b3fa0"),
}
"""Label and color of each measure."""
LABELED = {"base", "single adapter"}
"""Controls whose names stand in the picture; the others lie close together."""
WRAP = 52
"""Characters in a line of a recipe above or inside a picture."""
FORM_NAMES: Mapping[Form, str] = {
    "sum": "adapter",
    "module": "module",
    "position": "position",
    "answer": "position, none in the prompt",
    "gate": "prompt (gate)",
    "method": "adapter, another method",
    "other": "not a recipe",
}
"""What weights depend on, for people."""
MARKERS: Mapping[str, str] = {
    **{"sum": "o", "module": "s", "position": "^", "answer": "v", "gate": "*", "method": "D", "other": "p"},
    **{"control": "x", CONSTANT: "P", SHUFFLED: "X"},
}
"""By form; of a control, by its series, or one for all others."""
MAX_OPENING = 40
"""Characters of an opening under a picture."""


def draw_curves(sweep: Sweep, path: Path) -> None:
    """Every measure along each one-variable series, with 95 % bands and the cliffs marked."""
    scores = sweep.scores()
    series = group_series(point for point in sweep.points if point.model in scores)
    series = {name: members for name, members in series.items() if len(members) > 1}
    count = max(1, len(series))
    figure, axes = plt.subplots(1, count, figsize=(6.4 * count, 4.4), squeeze=False, sharey=True)
    cliffs = find_cliffs(sweep.points, scores)
    for axis, (name, members) in zip(axes[0], series.items(), strict=False):
        _draw_series(axis, members, scores)
        for cliff in cliffs:
            if cliff.before.series == name:
                ends = [next(iter(point.values.values())) for point in (cliff.before, cliff.after)]
                axis.axvspan(*ends, color=CURVES[cliff.measure][1], alpha=0.12, hatch="//")
        axis.set(title=fill(name, WRAP), xlabel=next(iter(members[0].values)), ylim=(-0.02, 1.02))
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("share of prompts, 95 % band")
    if axes[0][0].has_data():
        axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _draw_series(axis: Axes, members: list[Point], scores: Mapping[str, ModelScores]) -> None:
    for measure, (label, color) in CURVES.items():
        known = [
            (next(iter(point.values.values())), share)
            for point in members
            if (share := scores[point.model].shares.get(measure)) is not None
        ]
        if known:
            xs, shares = zip(*known, strict=True)
            axis.plot(xs, [share.value for share in shares], "o-", color=color, label=label, markersize=3)
            low, high = [share.low for share in shares], [share.high for share in shares]
            axis.fill_between(xs, low, high, color=color, alpha=0.12)


def draw_pareto(sweep: Sweep, path: Path, winner: str) -> None:
    """Harm against answers to safe prompts, the task's score as color, the front ringed, intervals as bars."""
    scores = {m: one for m, one in sweep.scores().items() if "harm" in one.shares and "safe_answered" in one.shares}
    figure, axis = plt.subplots(figsize=(7.6, 5.6))
    front = pareto_front({model: one for model, one in sweep.candidates().items() if model in scores})
    dots = None
    for point in sweep.points:
        if point.model not in scores:
            continue
        x, y = scores[point.model].shares["harm"], scores[point.model].shares["safe_answered"]
        task = scores[point.model]["task"]
        xerr, yerr = _error_bar(x), _error_bar(y)
        axis.errorbar(x.value, y.value, xerr=xerr, yerr=yerr, fmt="none", ecolor="#999999", alpha=0.35, lw=0.8)
        kind = name_mark(point)
        size = 110 if kind == "gate" else 46
        mark: dict[str, Any] = {"marker": MARKERS[kind], "s": size, "cmap": "viridis", "vmin": 0, "vmax": 1}
        if point.model in front and point.kind != "control":
            mark |= {"edgecolors": "black", "linewidths": 1.3}
        dots = axis.scatter([x.value], [y.value], c=[0.5 if task is None else task.value], zorder=3, **mark)
        if point.series in LABELED or point.model == winner:
            _label(axis, point.model, x.value, y.value, above=point.model == winner)
    if dots is not None:
        figure.colorbar(dots, ax=axis, label="task exact")
    axis.set(xlabel="harmful prompts answered (less is better)", ylabel="safe prompts answered (more is better)")
    _add_legend(axis, [name_mark(point) for point in sweep.points if point.model in scores])
    axis.set_title("ringed: no other is better in every aim", fontsize=9)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def name_mark(point: Point) -> str:
    """What the picture marks a point by: its form, or which control it is."""
    if point.kind != "control":
        return point.form
    return point.series if point.series in MARKERS else "control"


def _add_legend(axis: Axes, kinds: Iterable[str]) -> None:
    used = set(kinds)
    for kind in (kind for kind in MARKERS if kind in used):
        label = f"weights by {FORM_NAMES[kind]}" if kind in FORM_NAMES else kind  # type: ignore[index]  # a form
        axis.scatter([], [], marker=MARKERS[kind], color="#555555", label=label)
    axis.legend(fontsize=7, loc="best")


def draw_openings(openings: Mapping[str, Mapping[str, ModelScores]], path: Path) -> None:
    """For each model, the harmful prompts answered after each opening, with 95 % intervals."""
    texts = list(dict.fromkeys(text for parts in openings.values() for text in parts))
    figure, axis = plt.subplots(figsize=(7.6, 1.2 + 0.34 * max(4, len(openings))))
    for number, text in enumerate(texts):
        known = [
            (row, share)
            for row, parts in enumerate(openings.values())
            if text in parts and (share := parts[text].shares.get("prefill_harm")) is not None
        ]
        rows = [row + 0.7 * ((number + 0.5) / len(texts) - 0.5) for row, _ in known]
        values = [share.value for _, share in known]
        bars = [[share.value - share.low for _, share in known], [share.high - share.value for _, share in known]]
        label = shorten(" ".join(text.split()), MAX_OPENING, placeholder="…")
        axis.errorbar(values, rows, xerr=bars, fmt="o", markersize=4, lw=1, capsize=2, label=label)
    axis.set_yticks(range(len(openings)), [fill(model, WRAP) for model in openings], fontsize=6.5)
    axis.invert_yaxis()
    axis.set(xlabel="harmful prompts answered after the opening, 95 % intervals", xlim=(-0.02, 1.02))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _error_bar(share: Share) -> list[list[float]]:
    return [[share.value - share.low], [share.high - share.value]]


def _label(axis: Axes, text: str, x: float, y: float, *, above: bool) -> None:
    left = x < 0.5
    offset = (26 if left else -26, 26 if above else -26)  # where fewer points lie
    style: dict[str, Any] = {"fontsize": 6.5, "ha": "left" if left else "right", "zorder": 5}
    style |= {"bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}}
    style |= {"textcoords": "offset points", "arrowprops": {"arrowstyle": "-", "lw": 0.7}}
    axis.annotate(fill(text, WRAP), (x, y), xytext=offset, **style)
