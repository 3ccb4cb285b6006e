"""A heat map of how two adapters differ: layers down, kinds of module across. Needs matplotlib."""

import math
from pathlib import Path
from typing import Any

from adapters.algebra.diff import Difference, ModuleDifference
from adapters.errors import FusionError
from adapters.recipes.weights import find_layer

PANELS = (
    ("cosine of the updates", "RdBu_r", -1.0, 1.0),
    ("mean angle of column spaces (°)", "viridis_r", 0.0, 90.0),
    ("mean angle of row spaces (°)", "viridis_r", 0.0, 90.0),
)


def write_heatmap(difference: Difference, path: Path) -> None:
    """Save a PNG; FusionError without matplotlib, or when no module has a layer number."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FusionError("a heat map needs matplotlib: pip install matplotlib") from error
    cells = {(find_layer(row.module), row.module.rpartition(".")[2]): row for row in difference.modules}
    layers = sorted({layer for layer, _ in cells if layer is not None})
    kinds = sorted({kind for layer, kind in cells if layer is not None})
    if not layers:
        raise FusionError("no module has a layer number: there is nothing to draw by layer")
    figure = Figure(figsize=(4 * len(PANELS), 1.5 + 0.22 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(PANELS), squeeze=False)[0]
    for panel, (title, colors, low, high) in enumerate(PANELS):
        values = [[_value(cells.get((layer, kind)), panel) for kind in kinds] for layer in layers]
        _draw(figure, axes[panel], values, title, colors, low, high)
        axes[panel].set_xticks(range(len(kinds)), kinds, rotation=60, ha="right")
        axes[panel].set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes[0].set_ylabel("layer")
    figure.savefig(path, dpi=120, format="png")


def _draw(figure: Any, axes: Any, values: list[list[float]], title: str, colors: str, low: float, high: float) -> None:
    image = axes.imshow(values, cmap=colors, vmin=low, vmax=high, aspect="auto")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)


def _value(row: ModuleDifference | None, panel: int) -> float:
    """What a panel shows for a module; NaN (blank) where there is nothing."""
    if row is None:
        return math.nan
    if panel == 0:
        return math.nan if row.cosine is None else row.cosine
    angles = row.column_angles if panel == 1 else row.row_angles
    return sum(angles) / len(angles) if angles else math.nan
