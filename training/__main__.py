"""Train a LoRA adapter from a recipe file.

It is a module run from the root of the repository:
    python -m training run training/recipes/safety.toml --out examples/adapters/safety
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BASES = Path(".cache/base")
"""Where `make setup` puts base models, by name."""
ADAPTERS = Path("examples/adapters")


def replayable(recipe: Path, out: Path) -> str:
    """The command for the adapter's README; a path of this machine is not written down."""
    command = f"python -m training run training/recipes/{recipe.name}"
    return command if out.is_absolute() else f"{command} --out {out.as_posix()}"


def main(argv: list[str] | None = None) -> int:
    """Command line; exit 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    command = parser.add_subparsers(required=True).add_parser("run", help="train a recipe")
    command.add_argument("recipe", type=Path, help="a TOML file, see training/recipes/")
    command.add_argument("--out", type=Path, help="default: examples/adapters/NAME of the recipe")
    command.add_argument("--base", type=Path, help="default: .cache/base/NAME of the base")
    args = parser.parse_args(argv)

    from training import lora, recipe

    out: Path = args.out or ADAPTERS / args.recipe.stem
    try:
        loaded = recipe.load(args.recipe)
        lora.run(
            loaded,
            folder=args.recipe.parent,
            base=args.base or BASES / loaded.adapter.base,
            out=out,
            command=replayable(args.recipe, out),
        )
    except (recipe.RecipeError, FileNotFoundError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    print(f"saved {out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
