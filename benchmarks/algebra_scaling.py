"""How fusing scales with adapters, rank and layers: `python -m benchmarks.algebra --rows scaling`."""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from adapters import fuse, parse
from benchmarks.algebra_cases import LAYERS_7B, QV, draw_adapter, time_call
from benchmarks.common import RESULTS, machine

COMMAND = "python -m benchmarks.algebra --rows scaling"

SCALES: dict[str, Sequence[int]] = {
    "adapters": (1, 2, 4, 8, 16),
    "rank": (4, 8, 16, 32, 64, 128),
    "layers": (8, 16, 32, 64, 80),
}
SCALED: dict[str, Callable[[str, int], str]] = {
    "sum": lambda terms, rank: terms,
    "svd": lambda terms, rank: f"svd({terms}, rank={rank})",
    "knots": lambda terms, rank: f"knots({terms})",
}


def measure_scaling() -> None:
    """Measure seconds by number of adapters, rank and layers; write a JSON file and a plot."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for variable, values in SCALES.items():
        tables[variable] = []
        for value in values:
            at = {"adapters": 2, "rank": 8, "layers": LAYERS_7B} | {variable: value}
            parents = {f"p{i}": draw_adapter(i, QV, at["layers"], at["rank"]) for i in range(at["adapters"])}
            terms = " + ".join(f"{1 / len(parents):.6g}*{name}" for name in parents)
            seconds: dict[str, float] = {}
            for method, text in SCALED.items():
                recipe = parse(text(terms, at["rank"]))
                fuse(recipe, parents)  # the first call is slower
                seconds[method] = median(time_call(lambda: fuse(recipe, parents)) for _ in range(3))  # noqa: B023 - called at once
            tables[variable].append({"at": value, "seconds": seconds})
            print(f"    {variable} {value}: {seconds}", flush=True)
    content = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": COMMAND,
        "machine": machine(),
        "case": "Llama-2-7B q/v, in memory; two adapters of rank 8 on 32 layers where nothing else is said; seconds",
        "tables": tables,
    }
    (RESULTS / "algebra-scaling.json").write_text(json.dumps(content, indent=1) + "\n")
    _plot(tables, RESULTS / "algebra-scaling.png")


def _plot(tables: dict[str, list[dict[str, Any]]], file: Path) -> None:
    import matplotlib  # only here: it takes seconds

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tables), figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, (variable, rows) in zip(axes, tables.items(), strict=True):
        for method in SCALED:
            axis.plot([row["at"] for row in rows], [row["seconds"][method] for row in rows], "o-", label=method)
        axis.set(xlabel=variable, xscale="log", yscale="log")
        axis.set_xticks([row["at"] for row in rows], [str(row["at"]) for row in rows])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds, Llama-2-7B q/v")
    axes[0].legend()
    figure.savefig(file, dpi=110)
