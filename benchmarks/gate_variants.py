"""Gates that choose more sharply, or sooner, than the one they are made of: its readout at another scale and middle."""

import json
import math
import shutil
from pathlib import Path

VARIANTS = {"sharp": (3.0, 0.1), "keen": (3.0, 0.25)}
"""By name: how many times as steep, and which share of the gate itself is the middle."""


def write_variants(gate: Path, place: Path) -> dict[str, Path]:
    """Copies of the gate's folder in `place` with other readouts, by name."""
    config = json.loads((gate / "adapter_config.json").read_text(encoding="utf-8"))
    scale, offset = config["gate"]["scale"], config["gate"]["offset"]
    folders = {name: place / name for name in VARIANTS}
    for name, (steepness, middle) in VARIANTS.items():
        shutil.copytree(gate, folders[name], dirs_exist_ok=True)
        moved = {"scale": steepness * scale, "offset": steepness * (offset - math.log(middle / (1 - middle)))}
        config["gate"] |= moved
        (folders[name] / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folders
