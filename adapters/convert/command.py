"""The command `convert`: its options, and what it prints."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from adapters.convert.conversion import Change, convert
from adapters.convert.copies import DropCopies
from adapters.convert.dora import MergeDora
from adapters.errors import FusionError
from adapters.files.io import load
from adapters.files.rounding import AUTO, DTYPES, TOLERANCE
from adapters.files.shipped import adapter_path

MAX_SERVED_RANK = 512
HELP = "make a plain PEFT folder of an adapter in another form"


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    command.add_argument(
        "source", help="a folder with adapter_model.bin or .safetensors, a .zip or .tar of one, or the file"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="the folder to write; must not exist")
    command.add_argument("--like", metavar="PATH", help="name the modules as this adapter of the same base does")
    command.add_argument(
        "--base", metavar="DIR", help="leave out copies of weights that equal those in this folder of the base"
    )
    command.add_argument(
        "--merge-dora",
        metavar="BASE",
        help="make the nearest plain LoRA of a DoRA, with the weights of the base's folder",
    )
    command.add_argument("--rank", type=int, metavar="N", help="with --merge-dora: largest rank of a module")
    command.add_argument(
        "--max-error", type=float, metavar="E", help="with --merge-dora: the smallest rank with this relative error"
    )
    command.add_argument(
        "--one-rank",
        action="store_true",
        help="pad all modules to one rank and alpha, for programs that know no rank_pattern and alpha_pattern",
    )
    add_dtype(command)


def add_dtype(command: argparse.ArgumentParser) -> None:
    """Add the option that says in what dtype factors are written."""
    command.add_argument(
        "--dtype",
        choices=(AUTO, *DTYPES),
        default=AUTO,
        help="of the factors written; auto: the adapters' own, or float32 where rounding to that would change an "
        f"update by more than {TOLERANCE:g} of it (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> tuple[str, Mapping[str, object]]:
    """Convert; what to print as text, and with --json."""
    like = load(adapter_path(args.like)) if args.like else None
    dora = _read_merge(args)
    changes: list[Change] = [] if args.base is None else [DropCopies(Path(args.base))]
    changes += [] if dora is None else [dora]
    source, out, dtype = Path(args.source), Path(args.out), DTYPES.get(args.dtype)
    done = convert(source, out, changes=changes, like=like, one_rank=args.one_rank, dtype=dtype)
    adapter, notes = done.adapter, [f"note: {note}" for note in done.notes]
    summary = f"{len(adapter.modules)} modules, rank {adapter.rank}, base {adapter.base}"
    content: dict[str, object] = {
        "out": args.out,
        "modules": len(adapter.modules),
        "rank": adapter.rank,
        "base": adapter.base,
    }
    content["notes"] = list(done.notes)
    if dora is not None:
        report = dora.reports[-1]
        notes += [f"DoRA merged: {report.table()}", *_warn_of_rank(report.rank)]
        content["dora"] = report.to_json()
    return "\n".join([summary, *notes, f"written to {args.out}"]), content


def _read_merge(args: argparse.Namespace) -> MergeDora | None:
    if args.merge_dora is not None:
        return MergeDora(Path(args.merge_dora), args.rank, args.max_error)
    if args.rank is not None or args.max_error is not None:
        raise FusionError("--rank and --max-error need --merge-dora BASE")
    return None


def _warn_of_rank(rank: int) -> list[str]:
    return [f"note: rank {rank} is over {MAX_SERVED_RANK}, the largest that vLLM serves"] * (rank > MAX_SERVED_RANK)
