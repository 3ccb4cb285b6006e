"""Train LoRA adapters, on one core or a cluster.

{prog} run safety --set lora.r=16 --set data.path=my.jsonl
torchrun --nproc-per-node 8 -m training run my-recipe.toml --out runs/mine
{prog} resume RUN
{prog} export RUN OUT
{prog} data check FILE
{prog} gate --out DIR
"""

import argparse
import dataclasses
import io
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from adapters import FusionError
from training.config import COLUMN_PARTS, DataConfig, list_settings
from training.errors import ConfigError, NonFiniteLossError
from training.gates import command as gate_command
from training.recipe import list_recipes, load_recipe
from training.rows.formats import FORMATS

# What computes is imported where it is used: `--help` and bad input need none of it.

PROG = "python -m training"
RUNS = Path("runs")
_PEER_FAILURES = r"Connection (closed|reset) by peer|Broken pipe|Timed out waiting|unhandled system"
"""What gloo and NCCL say when another process is gone."""


def main(argv: Sequence[str] | None = None, *, prog: str = PROG) -> int:
    """Run one command; exit code 0 done, 1 failed while it ran, 2 bad input. `prog` is what the user typed before."""
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(prog).parse_args(argv)
    args.typed = f"{prog} {shlex.join(argv)}"
    command: Callable[[argparse.Namespace], None] = args.command
    try:
        command(args)
    except (ConfigError, FusionError) as error:
        return _fail(str(error), 2)
    except (NonFiniteLossError, OSError) as error:
        return _fail(str(error), 1)
    except RuntimeError as error:
        if not _peer_failed(error):
            raise
        return _fail("stopped because another process of this run ended: see its error", 1)
    return 0


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The parser; `args.command` is the function to call with the arguments."""
    text = (__doc__ or "").format(prog=prog)
    parser = argparse.ArgumentParser(prog=prog, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{run,resume,export,data,gate,chat}")

    def add(name: str, command: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(command=command)
        return added

    _add_run_arguments(add("run", _run, "train a recipe"))
    resume = add("resume", _resume, "continue a run from its last checkpoint")
    resume.add_argument("run", type=Path, help="the run's folder")
    _add_result_arguments(resume)
    _add_export_arguments(
        add("export", _export, "write a run's checkpoint as a PEFT adapter, or as a whole model with --merge or --fsdp")
    )
    data = commands.add_parser("data", help="look at training data").add_subparsers(required=True, metavar="{check}")
    check = data.add_parser(
        "check", help="three rows as the model sees them, columns, lengths, duplicates, rows left out"
    )
    check.set_defaults(command=_check)
    _add_check_arguments(check)
    gate_command.add_arguments(add("gate", gate_command.run, "train a gate, which chooses weights by prompt"))
    _add_chat_arguments(add("chat", _chat, "talk to an adapter, without a server"))
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, f"{_settings()}\n\n{_formats()}"
    parser.add_argument("recipe", help=f"a TOML file, or a bundled recipe: {', '.join(list_recipes())}")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="override a setting listed below; may be repeated",
    )
    parser.add_argument("--base", help="same as --set model.base=…")
    _add_row_arguments(parser)
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/NAME-TIME)")
    _add_result_arguments(parser)


def _add_row_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="PART=COLUMN,…",
        help=f"the columns of the chat's parts, as in data.columns: prompt=question,answer=response; "
        f"parts: {', '.join(COLUMN_PARTS)}",
    )
    parser.add_argument("--strict", action="store_true", help="refuse data with rows that cannot be read")


def _parse_columns(texts: Sequence[str]) -> dict[str, str]:
    """{part: column} of the arguments `PART=COLUMN,…`."""
    pairs = [pair.partition("=") for text in texts for pair in text.split(",")]
    for part, equals, _ in pairs:
        if not equals:
            raise ConfigError(f"--columns {part!r}: expected PART=COLUMN such as prompt=question,answer=response")
    return {part.strip(): column.strip() for part, _, column in pairs}


def _add_result_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="also write the adapter here, replacing an older one"
    )
    parser.add_argument(
        "--register",
        metavar="URL",
        help="make a running service load the adapter (its API key, if it has one, in REGISTER_API_KEY)",
    )
    parser.add_argument("--name", help="the adapter's name there (default: the folder's)")


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run; with --merge also an adapter; with --fsdp a .distcp folder")
    parser.add_argument("out", type=Path, help="the folder to write; must not exist")
    parser.add_argument("--step", type=int, help="the checkpoint of this step (default: the last)")
    parser.add_argument("--merge", action="store_true", help="base and adapter merged, as a Hugging Face folder")
    parser.add_argument("--fsdp", action="store_true", help="a full sharded checkpoint as a Hugging Face folder")
    parser.add_argument("--base", help="the base's folder or name (default: what the adapter names)")


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _formats()
    parser.add_argument(
        "file", help="a JSON, JSONL, CSV, TSV or Parquet file, hub:NAME, orders:N, safety:train or safety:heldout"
    )
    parser.add_argument("--format", default="auto", help="default: recognized by the columns")
    parser.add_argument("--split", default="train", help="of a data set on the hub, or key of a JSON object")
    _add_row_arguments(parser)
    parser.add_argument(
        "--base", default="smollm2-135m-instruct", help="base whose tokenizer counts tokens (default: %(default)s)"
    )
    parser.add_argument("--template", default="", help="chat template for a base that has none")
    parser.add_argument("--max-tokens", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--against", action="append", default=[], metavar="PATH", help="evaluation files or folders")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="a PEFT adapter folder")
    parser.add_argument("--base", help="the base's folder or name (default: what the adapter names)")
    parser.add_argument("--weight", type=float, default=1.0, help="weight of the adapter (default: %(default)s)")
    parser.add_argument("--template", default="", help="chat template for a base that has none")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--max-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--prompt", help="answer this prompt and exit")


def _run(args: argparse.Namespace) -> None:
    from training import convert, run

    if args.export:
        convert.check_place(args.export, replace=True)  # now, not after hours
    overrides = [*args.set, *([f"model.base={json.dumps(args.base)}"] if args.base else [])]
    overrides += ["data.strict=true"] * args.strict
    if columns := _parse_columns(args.columns):
        pairs = ", ".join(
            f"{json.dumps(part)} = {json.dumps(column, ensure_ascii=False)}" for part, column in columns.items()
        )
        overrides.append(f"data.columns={{{pairs}}}")
    config, warnings = load_recipe(args.recipe, overrides)
    if _is_main():
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    if args.out is None and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("--out is missing: several processes need the same folder")
    out = args.out or RUNS / f"{Path(args.recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    _finish(args, out, run.start(config, out, args.typed).step)


def _resume(args: argparse.Namespace) -> None:
    from training import convert, run

    if args.export:
        convert.check_place(args.export, replace=True)
    _finish(args, args.run, run.resume(args.run).step)


def _finish(args: argparse.Namespace, folder: Path, steps: int) -> None:
    """What follows a complete run: the adapter's copy and its registration."""
    from training import convert, run
    from training.registration import register

    if not _is_main():
        return
    adapter = folder / run.ADAPTER
    print(f"{steps} steps, adapter in {adapter}", flush=True)
    if args.export:
        card = (adapter / convert.CARD).read_text(encoding="utf-8")
        adapter = convert.export(folder, args.export, replace=True, card=card)
        print(f"adapter in {adapter}", flush=True)
    if args.register:
        name = args.name or (args.export.name if args.export else folder.name)
        print(f"registered as {name}: {register(args.register, name, adapter)}", flush=True)


def _export(args: argparse.Namespace) -> None:
    from training import convert, run

    if args.merge:
        adapter = args.run / run.ADAPTER if (args.run / run.CONFIG).exists() else args.run
        convert.merge(adapter, args.out, base=args.base)
    elif args.fsdp:
        if not args.base:
            raise ConfigError("--base is missing: --fsdp needs a folder or name for configuration and tokenizer")
        convert.from_fsdp(args.run, args.base, args.out)
    else:
        card = args.run / run.ADAPTER / convert.CARD
        convert.export(args.run, args.out, step=args.step, card=card.read_text() if card.exists() else "")
    print(f"written to {args.out}", flush=True)


def _check(args: argparse.Namespace) -> None:
    from training.base_model import load_tokenizer, resolve_base
    from training.rows.dataset import build_dataset
    from training.rows.encoding import set_template
    from training.rows.preview import MASK, print_row, split_row

    tokenizer = load_tokenizer(resolve_base(args.base))
    set_template(tokenizer, args.template)
    options = {"path": args.file, "against": tuple(args.against), "columns": _parse_columns(args.columns)}
    options |= {name: getattr(args, name) for name in ("format", "split", "strict", "max_tokens")}
    data = build_dataset(DataConfig(**options, too_long="drop", allow_overlap=True), tokenizer)
    if args.json:
        preview = [{"where": row.where, "text": split_row(row, tokenizer)} for row in data.first]
        print(json.dumps(dataclasses.asdict(data.report) | {"preview": preview}, indent=2))
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # rows may hold what the terminal's encoding has not
    rows = [print_row(row, tokenizer) for row in data.first]
    print(*rows, f"--- (text in {MASK[0]} and {MASK[1]} is not learned)", data.report.text(), sep="\n")


def _chat(args: argparse.Namespace) -> None:
    from training.chat import chat

    options = ("base", "weight", "template", "max_tokens", "system", "prompt")
    chat(args.adapter, **{name: getattr(args, name) for name in options})


def _settings() -> str:
    lines = [f"  {key} = {value}" for key, value in list_settings()]
    return "\n".join(["settings and their defaults (a preset in the recipe changes some):", *lines])


def _formats() -> str:
    return "\n".join(["formats:", *(f"  {name:12} {one.summary}" for name, one in FORMATS.items())])


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _fail(message: str, code: int) -> int:
    """Print the error, once where it is the same for all processes, and return the exit code."""
    single = os.environ.get("WORLD_SIZE", "1") == "1"
    if code != 2 or _is_main():
        print(
            f"error: {message}" if single else f"error (process {os.environ.get('RANK')}): {message}", file=sys.stderr
        )
    return code


def _peer_failed(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and bool(re.search(_PEER_FAILURES, str(error)))
