"""Train LoRA adapters, on one core or a cluster.

python -m training run training/recipes/safety.toml --set lora.r=16 --set data.path=my.jsonl
torchrun --nproc-per-node 8 -m training run training/recipes/task.toml
python -m training resume RUN
python -m training export RUN OUT
python -m training data check FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

RUNS = Path("runs")


def main(argv: list[str] | None = None) -> int:
    """Command line; exit 0 done, 1 failed while it ran, 2 bad input."""
    arguments = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(arguments)
    from adapters import FusionError
    from training.config import ConfigError
    from training.loop.fit import NonFiniteLoss

    command: Callable[[argparse.Namespace], None] = args.command
    args.typed = f"python -m training {' '.join(arguments)}"
    try:
        command(args)
    except (ConfigError, FusionError) as error:
        return _say(str(error), 2)
    except (NonFiniteLoss, OSError) as error:
        return _say(str(error), 1)
    except RuntimeError as error:
        if not _left_alone(error):
            raise
        return _say("stopped, since another process of this run has ended: its error is the one to read", 1)
    return 0


def _say(message: str, code: int) -> int:
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if code != 2 or rank == "0":  # bad input is the same for all
        print(f"training: {message}" if world == "1" else f"training (process {rank}): {message}", file=sys.stderr)
    return code


def _left_alone(error: RuntimeError) -> bool:
    """Whether a collective failed because a peer is gone."""
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out waiting",
        "unhandled system",
    )
    return os.environ.get("WORLD_SIZE", "1") != "1" and any(sign in str(error) for sign in signs)


def _run(args: argparse.Namespace) -> None:
    from training import config, convert, run

    if args.export:
        convert.check_place(args.export, replace=True)  # now, not after hours
    overrides = [*args.set, *([f"model.base={json.dumps(args.base)}"] if args.base else [])]
    settings, warnings = config.load(args.recipe, overrides)
    if os.environ.get("RANK", "0") == "0":
        for warning in warnings:
            print(f"training: warning: {warning}", file=sys.stderr)
    out = args.out or RUNS / f"{args.recipe.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.out is None:
        raise config.ConfigError("several processes need one --out")
    _finish(args, out, run.start(settings, out, args.typed).step)


def _resume(args: argparse.Namespace) -> None:
    from training import convert, run

    if args.export:
        convert.check_place(args.export, replace=True)
    _finish(args, args.run, run.resume(args.run).step)


def _finish(args: argparse.Namespace, folder: Path, steps: int) -> None:
    """What follows a run that is complete: the adapter's copy and its registration."""
    from training import convert, run

    if os.environ.get("RANK", "0") != "0":
        return
    adapter = folder / run.ADAPTER
    print(f"{steps} steps, adapter in {adapter}", flush=True)
    if args.export:
        card = (adapter / convert.CARD).read_text(encoding="utf-8")
        adapter = convert.export(folder, args.export, replace=True, card=card)
        print(f"adapter in {adapter}", flush=True)
    if args.register:
        name = args.name or (args.export.name if args.export else folder.name)
        print(f"registered as {name}: {run.register(args.register, name, adapter)}", flush=True)


def _export(args: argparse.Namespace) -> None:
    from training import convert, run

    if args.merge:
        convert.merge(
            args.run / run.ADAPTER if (args.run / run.CONFIG).exists() else args.run, args.out, base=args.base
        )
    elif args.fsdp:
        from training.config import ConfigError

        if not args.base:
            raise ConfigError("--fsdp needs --base: the folder or name that gives configuration and tokenizer")
        convert.from_fsdp(args.run, args.base, args.out)
    else:
        card = args.run / run.ADAPTER / convert.CARD
        convert.export(args.run, args.out, step=args.step, card=card.read_text() if card.exists() else "")
    print(f"written to {args.out}", flush=True)


def _check(args: argparse.Namespace) -> None:
    from training.config import DataConfig
    from training.loop.model import find_base, load_tokenizer
    from training.rows import dataset
    from training.rows.encoding import set_template

    tokenizer = load_tokenizer(find_base(args.base))
    set_template(tokenizer, args.template)
    data = DataConfig(
        path=args.file,
        format=args.format,
        max_tokens=args.max_tokens,
        too_long="drop",
        against=tuple(args.against),
        allow_overlap=True,
    )
    report = dataset.build(data, tokenizer).report
    print(json.dumps(dataclasses.asdict(report), indent=2) if args.json else report.text())


def _chat(args: argparse.Namespace) -> None:
    from training import chat

    chat.talk(
        args.adapter,
        base=args.base,
        weight=args.weight,
        template=args.template,
        max_tokens=args.max_tokens,
        system=args.system,
        prompt=args.prompt,
    )


def _settings() -> str:
    from training.config import defaults

    shown = [f"  {key} = {value}" for key, value in defaults()]
    return "\n".join(["settings and their defaults (a preset in the recipe changes some):", *shown])


def _formats() -> str:
    from training.rows.readers import FORMATS

    return "\n".join(["formats:", *(f"  {name:12} {one.summary}" for name, one in FORMATS.items())])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True, metavar="{run,resume,export,data,chat}")

    def add(name: str, command: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=help, description=help)
        found.set_defaults(command=command)
        return found

    start = add("run", _run, "train a recipe")
    start.formatter_class, start.epilog = argparse.RawDescriptionHelpFormatter, f"{_settings()}\n\n{_formats()}"
    start.add_argument("recipe", type=Path, help="a TOML file, see training/recipes/")
    start.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="a setting, below; may be repeated"
    )
    start.add_argument("--base", help="same as --set model.base=…")
    start.add_argument("--out", type=Path, help="the run's folder (default: runs/NAME-TIME)")
    go_on = add("resume", _resume, "go on with a run from its last checkpoint")
    go_on.add_argument("run", type=Path, help="the run's folder")
    for one in (start, go_on):
        one.add_argument(
            "--export", type=Path, metavar="DIR", help="also put the adapter here, in the place of an older one"
        )
        one.add_argument(
            "--register",
            metavar="URL",
            help="make a running service load the adapter (its API key, if it has one, in REGISTER_API_KEY)",
        )
        one.add_argument("--name", help="its name there (default: the folder's)")
    export = add("export", _export, "a run's checkpoint as a PEFT adapter; or whole models, see the options")
    export.add_argument("run", type=Path, help="a run; with --merge also an adapter; with --fsdp a .distcp folder")
    export.add_argument("out", type=Path, help="the folder to write; must not exist")
    export.add_argument("--step", type=int, help="of this checkpoint (default: the last)")
    export.add_argument("--merge", action="store_true", help="base and adapter merged, as a Hugging Face folder")
    export.add_argument("--fsdp", action="store_true", help="a full sharded checkpoint as a Hugging Face folder")
    export.add_argument("--base", help="the base's folder or name (default: what the adapter says)")
    data = commands.add_parser("data", help="look at training data").add_subparsers(required=True, metavar="{check}")
    check = data.add_parser("check", help="lengths, duplicates, empty answers, overlap with evaluation sets")
    check.set_defaults(command=_check)
    check.formatter_class, check.epilog = argparse.RawDescriptionHelpFormatter, _formats()
    check.add_argument("file", help="a JSON, JSONL or CSV file, hub:NAME, or orders:N")
    check.add_argument("--format", default="auto", help="default: told by the columns")
    check.add_argument(
        "--base", default="smollm2-135m-instruct", help="whose tokens are counted (default: %(default)s)"
    )
    check.add_argument("--template", default="", help="chat template for a base that has none")
    check.add_argument("--max-tokens", type=int, default=512, help="default: %(default)s")
    check.add_argument("--against", action="append", default=[], metavar="PATH", help="evaluation files or folders")
    check.add_argument("--json", action="store_true", help="print JSON instead of text")
    chat = add("chat", _chat, "talk to an adapter, without a server")
    chat.add_argument("adapter", type=Path, help="a PEFT adapter folder")
    chat.add_argument("--base", help="the base's folder or name (default: what the adapter says)")
    chat.add_argument("--weight", type=float, default=1.0, help="of the adapter (default: %(default)s)")
    chat.add_argument("--template", default="", help="chat template for a base that has none")
    chat.add_argument("--system", default="", help="system message")
    chat.add_argument("--max-tokens", type=int, default=256, help="default: %(default)s")
    chat.add_argument("--prompt", help="answer this and end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
