"""Evaluation sets on the command line: which data a task takes, what its columns mean, and how they were read."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval_clients.errors import UsageError
from eval_clients.tasks.benchmarks import BENCHMARKS, describe_data, guess_benchmark
from eval_clients.tasks.items import Reading
from eval_clients.tasks.layouts import ROLES

Readings = Mapping[str, Sequence[Mapping[str, object]]]
"""How the data of each task was read, as JSON."""
COLUMN_HELP = f"""column of a role ({", ".join(ROLES)}), by name or number, where the file's own names do not tell;
may be repeated"""


@dataclass(frozen=True, slots=True)
class Set:
    """The data of a task as it was asked for."""

    path: str
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column by role."""


def parse_columns(texts: Sequence[str]) -> dict[str, str]:
    """`ROLE=NAME` options as names by role; UsageError for other forms."""
    columns: dict[str, str] = {}
    for text in texts:
        role, sign, name = text.partition("=")
        if not sign or role not in ROLES:
            raise UsageError(f"--column {text!r}: expected ROLE=NAME, ROLE one of {', '.join(ROLES)}")
        if role in columns:
            raise UsageError(f"--column {text!r}: {role} is already {columns[role]!r}")
        columns[role] = name.strip()
    return columns


def read_task_options(args: argparse.Namespace) -> tuple[dict[str, Set], dict[str, int]]:
    """The data and the number of samples of each task of a sweep; UsageError when one is missing or unknown."""
    paths, counts = _read_pairs(args.data, "--data"), _read_pairs(args.samples, "--samples")
    names = list(dict.fromkeys(args.tasks.split(",")))
    for name in names:
        if name not in BENCHMARKS:
            raise UsageError(f"--tasks {name!r}: expected one of {', '.join(BENCHMARKS)}")
        if name not in paths:
            raise UsageError(f"--tasks {name!r} needs its data: --data {name}=PATH ({BENCHMARKS[name].needs})")
    for name, count in counts.items():
        if not count.isdigit() or count == "0":
            raise UsageError(f"--samples {name}={count}: expected a positive integer")
    columns: dict[str, list[str]] = {name: [] for name in names}
    for text in args.column or ():
        name, sign, column = text.partition(":")
        if not sign or name not in names:
            raise UsageError(f"--column {text!r}: expected TASK:ROLE=NAME, TASK one of {', '.join(names)}")
        columns[name].append(column)
    sets = {name: Set(paths[name], parse_columns(columns[name])) for name in names}
    return sets, {name: int(count) for name, count in counts.items()}


def _read_pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """`TASK=VALUE` options by task; UsageError for other forms and unknown tasks."""
    pairs = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or name not in BENCHMARKS:
            raise UsageError(f"{option} {text!r}: expected TASK=VALUE, TASK one of {', '.join(BENCHMARKS)}")
        pairs[name] = value
    return pairs


def show_sets(sets: Mapping[str, Set]) -> Readings:
    """Print to stderr how the data of each task is read; the same as JSON. DataError when it cannot be read."""
    readings = {name: describe_data(name, one.path, one.columns) for name, one in sets.items()}
    for name, parts in readings.items():
        print(format_readings(name, parts), file=sys.stderr)
    return {name: [reading.to_json() for reading in parts] for name, parts in readings.items()}


def write_readings(folder: Path, readings: Readings) -> None:
    """Write `data.json`: how the data of each task was read."""
    (folder / "data.json").write_text(json.dumps(readings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def format_readings(name: str, readings: Sequence[Reading]) -> str:
    """How a task's data is read, for people."""
    return "\n".join(f"{name}: {reading}" for reading in readings)


DATA_HELP = "show how an evaluation file is read, without asking anything"


def add_data_check(data: argparse.ArgumentParser) -> None:
    """Add `check FILE` to the parser of `data`."""
    commands = data.add_subparsers(dest="what", required=True, metavar="{check}")
    check = commands.add_parser("check", help=DATA_HELP, description=f"{DATA_HELP.capitalize()}.")
    check.add_argument("file", metavar="FILE", help="the evaluation set: a file, or the folder of a benchmark")
    check.add_argument("--task", choices=tuple(BENCHMARKS), help="the benchmark that reads it; default: by its layout")
    check.add_argument("--column", action="append", metavar="ROLE=NAME", help=COLUMN_HELP)
    check.add_argument("--json", action="store_true", help="print as JSON")


def run_data_check(args: argparse.Namespace) -> int:
    """Print how a file is read; DataError when it cannot be read."""
    columns = parse_columns(args.column or ())
    name = args.task or guess_benchmark(Path(args.file), columns)
    readings = describe_data(name, args.file, columns)
    if args.json:
        print(json.dumps({name: [reading.to_json() for reading in readings]}, indent=1, ensure_ascii=False))
    else:
        print(format_readings(name, readings))
    return 0
