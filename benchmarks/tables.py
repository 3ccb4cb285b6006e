"""Put the recorded figures into the README files: `python -m benchmarks.tables [--check]`.

Each table stands between `<!-- NAME -->` and `<!-- /NAME -->` and is made from `benchmarks/results/*.json` alone.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import HEADER, MEASUREMENTS, RESULTS, ROOT, Comparison, Measurement
from benchmarks.headline import render as headlines
from benchmarks.quality import render as rendered

PAIRS_FOR_95 = 6
"""The fewest values between whose lowest and highest the median lies with 95 %."""


def recorded(*names: str) -> list[dict[str, Any]]:
    """All comparisons and measurements on record."""
    files = [
        RESULTS / name
        for name in names or ("serving.json", "fusing.json", "algebra.json", "training.json", "sweeping.json")
    ]
    return [row for file in files if file.exists() for row in json.loads(file.read_text()).values()]


def restored(row: Mapping[str, Any]) -> Comparison | Measurement:
    """A record as what it was made from."""
    kind = Comparison if "peer" in row else Measurement
    return kind(**{field.name: row[field.name] for field in fields(kind)})


def figures(*names: str) -> str:
    """Every figure of these result files with its aim, and the commands that made them."""
    rows = recorded(*names)
    made = sorted({f"`{row['command']}`, {row['date']}, {row['machine']}" for row in rows})
    notes = [f"{row['name']}: {row['note']}." for row in rows if row["note"]]
    ratios = [restored(row).line() for row in rows if "peer" in row]
    alone = [restored(row).line() for row in rows if "peer" not in row]
    measured = ["", MEASUREMENTS, *alone] if alone else []
    return "\n".join([HEADER, *ratios, *measured, "", *(f"- {line}" for line in made + notes)])


def scaling() -> str:
    """Seconds of the algebra by number of adapters, rank and layers."""
    content = json.loads((RESULTS / "algebra-scaling.json").read_text())
    lines = []
    for variable, rows in content["tables"].items():
        methods = list(rows[0]["seconds"])
        lines += [f"| {variable} | {' | '.join(methods)} |", "| --- " * (len(methods) + 1) + "|"]
        for row in rows:
            lines.append(f"| {row['at']} | {' | '.join(format(row['seconds'][m], '.3g') for m in methods)} |")
        lines.append("")
    return "\n".join([*lines, f"{content['case']}: `{content['command']}`, {content['date']}, {content['machine']}"])


def highlights() -> str:
    """What the README opens with: figure, peer, ratio."""
    lines = [
        "| on 2 CPU cores | against | ratio (95 % interval; * three pairs: lowest to highest) |",
        "| --- | --- | --- |",
    ]
    for row in (row for row in recorded() if "peer" in row):
        less = "times the memory" if row["unit"] == "GB" else "times the time"
        (low, high), sign = row["interval"], "times" if row["aim"][0] == ">=" else less
        few = "*" if len(row["ours"]) < PAIRS_FOR_95 else ""
        lines.append(
            f"| {row['name']} | {row['peer_is']} | **{row['ratio']:.2f}** {sign} ({low:.2f}–{high:.2f}{few}) |"
        )
    return "\n".join(lines)


def quality() -> str:
    """What the shipped adapters do."""
    return rendered(json.loads((RESULTS / "quality.json").read_text())["models"])


def headline() -> str:
    """The paper's headline points at three seeds, and MMLU."""
    path = RESULTS / "headline.json"
    return headlines(json.loads(path.read_text())) if path.exists() else "Not measured yet."


TABLES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"results": highlights, "quality": quality},
    "benchmarks/README.md": {
        "tables": figures,
        "headline": headline,
        "gpu": partial(figures, "gpu.json"),
        "scaling": scaling,
    },
}


def filled(file: str) -> str:
    """The file's text with its tables made anew."""
    text = (ROOT / file).read_text()
    for name, make in TABLES[file].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, n = re.subn(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]  # mypy and the default of a lambda
        if n != 1:
            raise ValueError(f"{file}: expected one <!-- {name} --> … <!-- /{name} -->, found {n}")
    return text


def main() -> int:
    """Command line; exit 0 written or right, 1 a table differs from the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    args = parser.parse_args()
    stale = [file for file in TABLES if filled(file) != Path(ROOT / file).read_text()]
    for file in stale:
        print(f"{file}: {'differs from benchmarks/results' if args.check else 'renewed'}")
        if not args.check:
            (ROOT / file).write_text(filled(file))
    return int(bool(stale) and args.check)


if __name__ == "__main__":
    sys.exit(main())
