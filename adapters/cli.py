"""The command line: `python -m adapters {show,plan,fuse,diff,methods}`. Exit 0 done, 2 bad input."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from adapters.adapter import LoraAdapter
from adapters.algebra.diff import diff
from adapters.algebra.fuse import fuse, plan
from adapters.algebra.heatmap import write_heatmap
from adapters.algebra.rank import smallest_rank
from adapters.errors import FusionError, UnknownAdapterError
from adapters.files.io import load, save
from adapters.recipes import METHODS, Option, Recipe, check_name, parse

_EXAMPLE = """example:
  python -m adapters fuse "0.6*task + 0.4*safety" \\
      --adapter task=runs/task/adapter --adapter safety=runs/safety/adapter --out fused
  python -m adapters plan "0.6*task + 0.4*safety" --rank auto --max-error 0.01 \\
      --adapter task=runs/task/adapter --adapter safety=runs/safety/adapter
  python -m adapters diff runs/task/adapter runs/safety/adapter --png difference.png
"""
Answer = tuple[str, Mapping[str, object]]
AUTO = "auto"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Bad input is one line on stderr."""
    given = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], Answer] = given.command
    try:
        text, content = command(given)
    except (FusionError, OSError) as error:
        print(f"adapters: {error}", file=sys.stderr)
        return 2
    try:
        print(json.dumps(content, indent=2) if given.json else text, flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _show(given: argparse.Namespace) -> Answer:
    adapter = load(given.path)
    rows = [
        {"module": name, "rank": module.rank, "scaling": module.scaling, "shape": list(module.shape)}
        for name, module in adapter.modules.items()
    ]
    content = {
        "base": adapter.base,
        "digest": adapter.digest,
        "rank": adapter.rank,
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "bytes": adapter.nbytes,
        "modules": rows,
    }
    lines = [f"{key:<8}{value}" for key, value in content.items() if key != "modules"]
    lines += [f"{name}  rank {m.rank}  scaling {m.scaling:g}  {m.shape}" for name, m in adapter.modules.items()]
    return "\n".join(lines), content


def _plan(given: argparse.Namespace) -> Answer:
    recipe, parents = _inputs(given)
    limit = _rank_limit(given, recipe, parents)
    report = plan(recipe, parents, max_rank=limit, strict=given.strict, device=_device(given))
    return report.table(), {**report.to_json(), "max_rank": limit}


def _rank_limit(given: argparse.Namespace, recipe: Recipe, parents: Mapping[str, LoraAdapter]) -> int | None:
    """The rank limit that `--max-rank` or `--rank auto --max-error` asks for."""
    if given.rank == AUTO:
        if given.max_error is None:
            raise FusionError("--rank auto needs --max-error, the largest relative error allowed, such as 0.01")
        return smallest_rank(recipe, parents, max_error=given.max_error, device=_device(given))
    if given.max_error is not None:
        raise FusionError("--max-error goes with --rank auto")
    if given.rank is None:
        return None
    if not given.rank.isdecimal() or int(given.rank) < 1:
        raise FusionError(f"--rank (max_rank) is {given.rank!r}: expected a whole number from 1, or 'auto'")
    return int(given.rank)


def _device(given: argparse.Namespace) -> torch.device:
    """Where to compute."""
    try:
        return torch.empty(0, device=given.device).device
    except (RuntimeError, AssertionError) as error:
        raise FusionError(f"--device {given.device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _fuse(given: argparse.Namespace) -> Answer:
    recipe, parents = _inputs(given)
    out = Path(given.out)
    if out.exists():
        raise FileExistsError(f"{given.out!r} exists already: choose another --out or remove it first")
    limit = _rank_limit(given, recipe, parents)
    adapter, report = fuse(recipe, parents, max_rank=limit, strict=given.strict, device=_device(given))
    digests = {name: parents[name].digest for name in recipe.adapters}
    provenance: dict[str, object] = {
        "recipe": recipe.to_json(),
        "text": recipe.format(),
        "parents": digests,
        "max_rank": limit,
        "method_version": METHODS[recipe.method].version,
        "report": report.to_json(),
    }
    save(adapter, out, provenance=provenance)
    return f"{report.table()}\n\nwritten to {given.out}", {**report.to_json(), "out": given.out}


def _diff(given: argparse.Namespace) -> Answer:
    difference = diff(load(given.first), load(given.second))
    if given.png is None:
        return difference.table(), difference.to_json()
    write_heatmap(difference, Path(given.png))
    return f"{difference.table()}\n\ndrawn in {given.png}", {**difference.to_json(), "png": given.png}


def _methods(given: argparse.Namespace) -> Answer:
    lines, content = [], []
    for method in METHODS.values():
        options = [
            {"name": option.name, "kind": option.kind, "default": option.default, "help": option.help}
            for option in method.options
        ]
        content.append({"name": method.name, "version": method.version, "summary": method.summary})
        content[-1].update(reference=method.reference, options=options)
        lines.append(f"{method.name}: {method.summary}\n    {method.reference}")
        lines += [f"    {option.name}: {option.help} ({_default(option)})" for option in method.options]
    return "\n".join(lines), {"methods": content}


def _default(option: Option) -> str:
    return "required" if option.default is None else f"default {option.default}"


def _inputs(given: argparse.Namespace) -> tuple[Recipe, dict[str, LoraAdapter]]:
    """The recipe and the adapters it names; only those are read."""
    recipe = parse(given.recipe)
    paths: dict[str, str] = {}
    for text in given.adapter:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise FusionError(f"--adapter {text!r}: expected NAME=PATH")
        if check_name(name) in paths:
            raise FusionError(f"--adapter {text!r}: the name {name!r} is given twice")
        paths[name] = path
    for name in recipe.adapters:
        if name not in paths:
            raise UnknownAdapterError(name, paths)
    return recipe, {name: load(paths[name]) for name in recipe.adapters}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adapters",
        description="Fuse LoRA adapters by an algebraic recipe: exactly, or at the best rank that fits.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="{show,plan,fuse,diff,methods}")

    def add(name: str, run: Callable[[argparse.Namespace], Answer], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(command=run)
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
        return command

    add("show", _show, "what an adapter folder holds").add_argument("path", help="a PEFT adapter folder")
    for name, run, help in (
        ("plan", _plan, "what a recipe would cost in fidelity; writes nothing"),
        ("fuse", _fuse, "build a recipe's adapter as a PEFT folder"),
    ):
        command = add(name, run, help)
        command.add_argument("recipe", help="such as '0.6*task + 0.4*safety'")
        command.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH", help="may be repeated")
        command.add_argument(
            "--rank",
            "--max-rank",
            metavar="N|auto",
            help="largest rank of a module (default: no limit); auto: the smallest that keeps --max-error",
        )
        command.add_argument("--max-error", type=float, metavar="E", help="relative error allowed with --rank auto")
        command.add_argument("--device", metavar="D", default="cpu", help="such as cuda (default: %(default)s)")
        command.add_argument("--strict", action="store_true", help="refuse any loss")
        if name == "fuse":
            command.add_argument("--out", required=True, metavar="DIR", help="the folder to write; must not exist")
    compare = add("diff", _diff, "how far two adapters are apart, as updates of the base")
    compare.add_argument("first", help="a PEFT adapter folder")
    compare.add_argument("second", help="another of the same base")
    compare.add_argument("--png", metavar="FILE", help="draw cosines and principal angles by layer")
    add("methods", _methods, "the known methods, their options and references")
    return parser
