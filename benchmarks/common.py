"""What the benchmarks share: alternating pairs, medians with intervals, records of figures."""

import json
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from math import comb
from pathlib import Path
from statistics import median
from typing import Any, Literal

from eval_clients.shares import Share

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / ".cache/base/smollm2-135m-instruct"
BASE_NAME = "smollm2-135m-instruct"
RESULTS = Path(__file__).parent / "results"
PAIRS = 7


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Distribution-free interval of the median from order statistics, at 95 % or the widest there is."""
    ordered, n = sorted(values), len(values)
    for k in range(n // 2, 0, -1):
        if 1 - 2 * sum(comb(n, i) for i in range(k)) / 2**n >= 0.95:
            return ordered[k - 1], ordered[n - k]
    return ordered[0], ordered[-1]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure: what was measured on both sides, pair by pair; the ratio is ours / peer."""

    name: str
    ours_is: str
    peer_is: str
    unit: str
    aim: tuple[Literal["<=", ">="], float]
    ours: tuple[float, ...]
    peer: tuple[float, ...]
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        """Ours / peer, pair by pair."""
        return [a / b for a, b in zip(self.ours, self.peer, strict=True)]

    @property
    def met(self) -> bool:
        """Whether the median ratio reaches the aim."""
        sign, bound = self.aim
        value = median(self.ratios)
        return value <= bound if sign == "<=" else value >= bound

    def line(self) -> str:
        """A row of the table in README.md."""
        low, high = interval(self.ratios)
        return (
            f"| {self.name} | {median(self.ours):.3g} | {median(self.peer):.3g} {self.unit} "
            f"| **{median(self.ratios):.3g}** ({low:.3g}–{high:.3g}) | {self.aim[0]} {self.aim[1]:g} "
            f"| {'yes' if self.met else 'no'} | {len(self.ours)} |"
        )


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure of ours alone, a time or a size: run by run, the aim for its median."""

    name: str
    unit: str
    aim: float
    values: tuple[float, ...]
    note: str = ""

    def line(self) -> str:
        """A row of the table in README.md."""
        low, high = interval(self.values)
        value = median(self.values)
        met = "yes" if value <= self.aim else "no"
        return (
            f"| {self.name} | **{value:.3g}** ({low:.3g}–{high:.3g}) {self.unit} "
            f"| <= {self.aim:g} {self.unit} | {met} | {len(self.values)} |"
        )


MEASUREMENTS = "| figure of ours alone | median (interval) | target | met | runs |\n| --- | --- | --- | --- | --- |"
HEADER = (
    "| figure | ours | peer | ratio (interval) | target | met | pairs |\n| --- | --- | --- | --- | --- | --- | --- |"
)


def alternate(ours: Callable[[], float], peer: Callable[[], float], pairs: int = PAIRS) -> dict[str, Any]:
    """Measure both sides in turn, who goes first changing from pair to pair; one unmeasured round before."""
    ours(), peer()
    values: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            values[side].append((ours, peer)[side]())
        print(f"    pair {i + 1}/{pairs}: {values[0][-1]:.4g} against {values[1][-1]:.4g}", flush=True)
    return {"ours": tuple(values[0]), "peer": tuple(values[1])}


def record(file: str, command: str, rows: Sequence[Comparison | Measurement]) -> None:
    """Print the rows; add them, dated, to `benchmarks/results/FILE`, replacing older ones of the same name."""
    path = RESULTS / file
    RESULTS.mkdir(exist_ok=True)
    records = json.loads(path.read_text()) if path.exists() else {}
    for row in rows:
        provenance = {**stamp(command), "machine": machine()}
        values = row.ratios if isinstance(row, Comparison) else row.values
        name = "ratio" if isinstance(row, Comparison) else "median"
        records[row.name] = {**provenance, **asdict(row), name: median(values), "interval": list(interval(values))}
    path.write_text(json.dumps(records, indent=1) + "\n")
    for header, kind in ((HEADER, Comparison), (MEASUREMENTS, Measurement)):
        if lines := [row.line() for row in rows if isinstance(row, kind)]:
            print(header, *lines, sep="\n", flush=True)


def stamp(command: str) -> dict[str, str]:
    """When and by which command a figure was measured."""
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "command": command}


def machine() -> str:
    """The kind of machine, without its name; with a GPU the versions too, since those differ from the lock's."""
    import torch  # not needed by what only starts servers

    gpu = ""
    if torch.cuda.is_available():
        gpu = f", one {torch.cuda.get_device_name()}; vLLM {version('vllm')}, torch {torch.__version__}"
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{os.cpu_count()} cores of {line.partition(':')[2].strip()}{gpu}"
    return f"{os.cpu_count()} cores, {platform.machine()}{gpu}"


def format_cell(value: Any) -> str:
    """A recorded value as a cell of a table: a share with its interval, anything else as it is."""
    if isinstance(value, dict):
        return str(Share(value["hits"], value["total"], value["low"], value["high"]))
    return str(value)
