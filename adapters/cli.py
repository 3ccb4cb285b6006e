"""The command line: `python -m adapters {show,plan,fuse,diff,convert,methods}`. Exit 0 done, 2 bad input."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path

import torch

from adapters.adapter import LoraAdapter
from adapters.algebra.bound import acts_on_answer
from adapters.algebra.diff import diff
from adapters.algebra.fuse import STRICT_TOLERANCE, fuse, plan
from adapters.algebra.heatmap import write_heatmap
from adapters.algebra.rank import smallest_rank
from adapters.algebra.report import FusionReport
from adapters.convert import command as convert_command
from adapters.errors import FusionError, LossError, UnknownAdapterError
from adapters.files.io import load, save
from adapters.files.rounding import DTYPES, round_factors
from adapters.files.shipped import adapter_path
from adapters.recipes import METHODS, PROMPT, Recipe, check_name, check_prompt, parse
from adapters.together import check_together

PROG = "python -m adapters"
AUTO = "auto"
ANSWER_ONLY = "note: the result acts on the answer alone: serve it inside answer(…)"
_EXAMPLE = """example:
  {prog} fuse "0.6*task + 0.4*safety" \\
      --adapter task=runs/task/adapter --adapter safety=runs/safety/adapter --out fused
  {prog} plan "0.6*task + 0.4*safety" --rank auto --max-error 0.01 \\
      --adapter task=runs/task/adapter --adapter safety=runs/safety/adapter
  {prog} diff runs/task/adapter runs/safety/adapter --png difference.png
"""

Output = tuple[str, Mapping[str, object]]
"""What a command prints: as text, or with --json."""


def main(argv: Sequence[str] | None = None, *, prog: str = PROG) -> int:
    """Run one command; returns the exit status. Bad input is one line on stderr."""
    args = build_parser(prog).parse_args(list(map(_keep_recipe, sys.argv[1:] if argv is None else argv)))
    command: Callable[[argparse.Namespace], Output] = args.command
    try:
        text, content = command(args)
    except (FusionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        print(json.dumps(content, indent=2) if args.json else text, flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _keep_recipe(argument: str) -> str:
    """A recipe such as '-1*task' with a space in front, so that it is not taken for an option."""
    return f" {argument}" if re.match(r"-\.?\d.*\*", argument) else argument


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The parser of all commands; the parsed arguments hold the chosen one as `command`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Fuse LoRA adapters by an algebraic recipe: exactly, or at the best rank that fits.",
        epilog=_EXAMPLE.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="{show,plan,fuse,diff,convert,methods}")

    def add(name: str, run: Callable[[argparse.Namespace], Output], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(command=run)
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
        return command

    add("show", _show, "describe an adapter folder").add_argument("path", help="a PEFT adapter folder")
    _add_recipe_options(add("plan", _plan, "report what a recipe would cost in accuracy; writes nothing"))
    fuse_command = add("fuse", _fuse, "build a recipe's adapter as a PEFT folder")
    _add_recipe_options(fuse_command)
    fuse_command.add_argument("--out", required=True, metavar="DIR", help="the folder to write; must not exist")
    convert_command.add_dtype(fuse_command)
    compare = add("diff", _diff, "compare two adapters as updates of the base")
    compare.add_argument("first", help="a PEFT adapter folder")
    compare.add_argument("second", help="another one for the same base")
    _add_same_base(compare)
    compare.add_argument("--png", metavar="FILE", help="draw cosines and principal angles by layer")
    convert_command.add_options(add("convert", convert_command.run, convert_command.HELP))
    add("methods", _methods, "list the methods, their options and references")
    return parser


def _add_recipe_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help="a recipe such as '0.6*task + 0.4*safety'")
    command.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a PEFT folder, or shipped:NAME; may be repeated",
    )
    command.add_argument(
        "--rank",
        "--max-rank",
        metavar="N|auto",
        help="largest rank of a module (default: no limit); auto: the smallest rank within --max-error",
    )
    command.add_argument("--max-error", type=float, metavar="E", help="relative error allowed with --rank auto")
    command.add_argument("--device", metavar="D", default="cpu", help="such as cuda (default: %(default)s)")
    command.add_argument("--strict", action="store_true", help="reject any loss")
    _add_same_base(command)


def _add_same_base(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--same-base", action="store_true", help="the adapters are of one base, however they name it and its modules"
    )


def _show(args: argparse.Namespace) -> Output:
    adapter = load(adapter_path(args.path))
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
        **({"answer_only": True} if adapter.answer_only else {}),
        **({} if adapter.weight_range is None else {"weight_range": list(adapter.weight_range)}),
        **({} if adapter.gate is None else {"gate": asdict(adapter.gate)}),
        "notes": list(adapter.notes),
        "modules": rows,
    }
    others = ("answer_only", "weight_range", "modules", "notes")
    lines = [f"{key:<8}{value}" for key, value in content.items() if key not in others]
    if adapter.weight_range is not None:
        lines.append("recommended weights: {:g} to {:g}".format(*adapter.weight_range))
    lines += ["acts on the answer alone: serve it inside answer(…)"] * adapter.answer_only
    lines += [f"note    {note}" for note in adapter.notes]
    lines += [f"{name}  rank {m.rank}  scaling {m.scaling:g}  {m.shape}" for name, m in adapter.modules.items()]
    return "\n".join(lines), content


def _plan(args: argparse.Namespace) -> Output:
    recipe, parents = _read_inputs(args)
    notes = _note(args, recipe, parents)
    if recipe.is_constant and acts_on_answer(recipe, parents):
        notes.append(ANSWER_ONLY)
    else:
        check_prompt(recipe, [name for name, adapter in parents.items() if adapter.answer_only], args.recipe)
    if recipe.is_constant:
        report, limit = _plan_phase(args, recipe, parents)
        return "\n".join([report.table(), *notes]), {**report.to_json(), "max_rank": limit, "notes": notes}
    if recipe.gate is not None:
        notes.append(f"note: the gate {recipe.gate.by!r} chooses weights for each prompt; planned are its default ones")
    lines, rows = [recipe.format()], []
    for start, phase in recipe.choose({}).phases():
        report, limit = _plan_phase(args, phase, parents)
        lines += ["", f"from {'the prompt' if start == PROMPT else f'token {start} of the answer'} on:", report.table()]
        rows.append({"start": "prompt" if start == PROMPT else start, **report.to_json(), "max_rank": limit})
    return "\n".join([*lines, *notes]), {"recipe": recipe.format(), "phases": rows, "notes": notes}


def _plan_phase(
    args: argparse.Namespace, recipe: Recipe, parents: Mapping[str, LoraAdapter]
) -> tuple[FusionReport, int | None]:
    """The report of a recipe of one phase, and its rank limit."""
    limit, device = _choose_limit(args, recipe, parents), _find_device(args)
    report = plan(recipe, parents, max_rank=limit, strict=args.strict, device=device, same_base=args.same_base)
    return report, limit


def _fuse(args: argparse.Namespace) -> Output:
    recipe, parents = _read_inputs(args)
    out = Path(args.out)
    if out.exists():
        raise FileExistsError(f"{args.out!r} already exists: choose another --out or remove it first")
    limit = _choose_limit(args, recipe, parents)
    own = reduce(torch.promote_types, (adapter.dtype for adapter in parents.values()))
    adapter, report = fuse(
        recipe,
        parents,
        max_rank=limit,
        strict=args.strict,
        device=_find_device(args),
        same_base=args.same_base,
        dtype=torch.promote_types(own, torch.float32),
    )
    rounded = round_factors(adapter, DTYPES.get(args.dtype), own)
    if args.strict and rounded.error > STRICT_TOLERANCE:
        raise LossError(f"the result would be in {rounded.describe()}, and strict allows {STRICT_TOLERANCE:g}")
    adapter, report = rounded.adapter, replace(report, bytes=rounded.adapter.nbytes)
    provenance: dict[str, object] = {
        "recipe": recipe.to_json(),
        "text": recipe.format(),
        "parents": {name: parents[name].digest for name in recipe.adapters},
        "max_rank": limit,
        "method_version": METHODS[recipe.method].version,
        "report": report.to_json(),
        **rounded.to_json(),
    }
    save(adapter, out, provenance=provenance, one_rank=True)
    notes = _note(args, recipe, parents)
    notes += [ANSWER_ONLY] * adapter.answer_only
    text = "\n".join([report.table(), *notes, "", f"written to {args.out} in {rounded.describe()}"])
    return text, {**report.to_json(), **rounded.to_json(), "out": args.out, "notes": notes}


def _diff(args: argparse.Namespace) -> Output:
    first, second = (load(adapter_path(path)) for path in (args.first, args.second))
    difference = diff(first, second, same_base=args.same_base)
    if args.png is None:
        return difference.table(), difference.to_json()
    write_heatmap(difference, Path(args.png))
    return f"{difference.table()}\n\ndrawn in {args.png}", {**difference.to_json(), "png": args.png}


def _methods(args: argparse.Namespace) -> Output:
    lines, content = [], []
    for method in METHODS.values():
        options = [
            {"name": option.name, "kind": option.kind, "default": option.default, "help": option.help}
            for option in method.options
        ]
        content.append({"name": method.name, "version": method.version, "summary": method.summary})
        content[-1].update(reference=method.reference, options=options)
        lines.append(f"{method.name}: {method.summary}\n    {method.reference}")
        for option in method.options:
            default = "required" if option.default is None else f"default {option.default}"
            lines.append(f"    {option.name}: {option.help} ({default})")
    return "\n".join(lines), {"methods": content}


def _read_inputs(args: argparse.Namespace) -> tuple[Recipe, dict[str, LoraAdapter]]:
    """The recipe and the adapters it names; only those are read."""
    recipe = parse(args.recipe)
    paths: dict[str, str] = {}
    for text in args.adapter:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise FusionError(f"--adapter {text!r}: expected NAME=PATH")
        if check_name(name) in paths:
            raise FusionError(f"--adapter {text!r}: the name {name!r} is given twice")
        paths[name] = path
    for name in recipe.adapters:
        if name not in paths:
            raise UnknownAdapterError(name, paths)
    return recipe, {name: load(adapter_path(paths[name])) for name in recipe.adapters}


def _note(args: argparse.Namespace, recipe: Recipe, parents: Mapping[str, LoraAdapter]) -> list[str]:
    """What the user should know of the adapters, a line each."""
    notes = [f"{name}: {note}" for name in recipe.adapters for note in parents[name].notes]
    return [f"note: {note}" for note in (*notes, *check_together(parents, same_base=args.same_base))]


def _choose_limit(args: argparse.Namespace, recipe: Recipe, parents: Mapping[str, LoraAdapter]) -> int | None:
    """The rank limit that `--max-rank` or `--rank auto --max-error` asks for."""
    if args.rank == AUTO:
        if args.max_error is None:
            raise FusionError("--rank auto needs --max-error, the largest relative error allowed, such as 0.01")
        device = _find_device(args)
        return smallest_rank(recipe, parents, max_error=args.max_error, device=device, same_base=args.same_base)
    if args.max_error is not None:
        raise FusionError(f"--max-error {args.max_error:g} needs --rank auto")
    if args.rank is None:
        return None
    if not args.rank.isdecimal() or int(args.rank) < 1:
        raise FusionError(f"--rank (max_rank) is {args.rank!r}: expected a whole number ≥ 1, or 'auto'")
    return int(args.rank)


def _find_device(args: argparse.Namespace) -> torch.device:
    """The device to compute on; FusionError when torch cannot use it here."""
    try:
        return torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        raise FusionError(f"--device {args.device!r} cannot be used here: {str(error).splitlines()[0]}") from error
