"""`train gate`: its arguments."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from training.gates.config import GateConfig

HELP = {
    "base": "a model folder, the name of one in .cache/base, or a name on the hub",
    "template": "chat template for a base that has none",
    "data": "rows to learn from: a file, hub:NAME or safety:train; a row is dangerous when its answer is a refusal",
    "held_out": "rows to calibrate on (default: safety:heldout for safety:train, else a tenth of the rows)",
    "rows": "maximum number of rows, 0 for all",
    "max_tokens": "maximum tokens of a prompt",
    "rank": "rank of the LoRA",
    "yes": "text of the token whose probability dangerous prompts raise",
    "no": "likewise, for harmless prompts",
    "epochs": "passes over all rows",
    "batch_rows": "rows per step",
    "learning_rate": "highest learning rate",
    "dropout": "share of the LoRA's inputs set to zero in training",
    "weight_decay": "decay of the factors, as in AdamW",
    "recall": "move the middle of the bounds to where this share of the dangerous prompts held out lies above; "
    "0: the share between the bounds is the probability of danger",
    "seed": "of the factors, the order of the rows and dropout",
}
LISTS = {"targets": ("--targets", "layer that the LoRA changes"), "refusals": ("--refusal", "how a refusal begins")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command; what is not given is None."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the gate's folder; replaces an older one"
    )
    for field in fields(GateConfig):
        if field.name in LISTS:
            flag, what = LISTS[field.name]
            listed = ", ".join(map(str, field.default))  # type: ignore[arg-type]  # a tuple
            parser.add_argument(flag, dest=field.name, action="append", help=f"{what}; may be repeated ({listed})")
            continue
        default = "" if field.default == "" else f" (default: {field.default!r})"
        kind = type(field.default)
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=HELP[field.name] + default)


def run(args: argparse.Namespace) -> None:
    """Train the gate and print its table."""
    from training.gates.train import tabulate, train_gate

    given = {field.name: getattr(args, field.name) for field in fields(GateConfig)}
    settings: dict[str, Any] = {
        name: tuple(value) if name in LISTS else value for name, value in given.items() if value is not None
    }
    report = train_gate(GateConfig(**settings), args.out, args.typed)
    print(tabulate(report), f"gate in {args.out}", sep="\n", flush=True)
