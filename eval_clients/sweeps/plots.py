"""Plot the curves and the Pareto front of a sweep."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from eval_clients.results import ModelScores
from eval_clients.shares import Share
from eval_clients.sweeps.choice import find_cliffs, group_series, pareto_front
from eval_clients.sweeps.points import Point
from eval_clients.sweeps.sweep import Sweep

CURVES = {
    "harm": ("harmful prompts answered", "#b3261e"),
    "safe_answered": ("safe prompts answered", "#1b6e3c"),
    "degenerate": ("safe prompts: degenerate", "#8a6d00"),
    "task": ("task exact", "#1f4e99"),
    "mmlu": ("MMLU", "#6b3fa0"),
}
"""Label and color of each measure."""
LABELED = {"base", "single adapter"}
"""Controls whose names stand in the picture; the others lie close together."""
MARKERS = {"sweep": "o", "search": "D", "control": "x"}


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
        axis.set(title=name, xlabel=next(iter(members[0].values)), ylim=(-0.02, 1.02))
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("share of prompts, 95 % band")
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
        mark: dict[str, Any] = {"marker": MARKERS[point.kind], "s": 46, "cmap": "viridis", "vmin": 0, "vmax": 1}
        if point.model in front and point.kind != "control":
            mark |= {"edgecolors": "black", "linewidths": 1.3}
        dots = axis.scatter([x.value], [y.value], c=[0.5 if task is None else task.value], zorder=3, **mark)
        if point.series in LABELED or point.model == winner:
            _label(axis, point.model, x.value, y.value, above=point.model == winner)
    if dots is not None:
        figure.colorbar(dots, ax=axis, label="task exact")
    axis.set(xlabel="harmful prompts answered (less is better)", ylabel="safe prompts answered (more is better)")
    axis.set_title("o sweep   ◇ search   × control   ringed: no other is better in every aim", fontsize=9)
    axis.grid(alpha=0.25)
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
    axis.annotate(text, (x, y), xytext=offset, **style)
