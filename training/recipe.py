"""Recipes: a TOML file, the preset it names below it and `--set` overrides on top, as a `Config`."""

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from adapters import did_you_mean
from training.config import PRESETS, SOURCES, Config
from training.errors import ConfigError
from training.toml import Tables, apply_override, build, merge

RECIPES = Path(__file__).parent / "recipes"
"""Recipes that ship with the package; each can be named without its path."""

_WITHOUT_EFFECT: Sequence[tuple[str, Callable[[Config], bool], str]] = (
    ("train.decay", lambda c: c.train.schedule != "step", 'only train.schedule = "step" decays by it'),
    ("train.warmup", lambda c: c.train.warmup == 0, "it is 0"),
    ("train.opening_tokens", lambda c: c.train.opening_weight == 1, "train.opening_weight is 1"),
    ("data.split", lambda c: not _has_splits(c.data.path), "data.path is not on the hub"),
    ("data.columns", lambda c: c.data.path.startswith(("orders:", "safety:")), "built-in data have one format"),
    ("data.allow_overlap", lambda c: not c.data.against, "data.against is empty"),
    ("policy.selective_every", lambda c: c.policy.checkpointing != "selective", "checkpointing is not selective"),
    ("data.format", lambda c: c.data.path.startswith(("orders:", "safety:")), "built-in data have one format"),
    ("train.epochs", lambda c: 0 < c.train.max_steps < c.train.epochs, "train.max_steps ends the run sooner"),
)


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """(the run, warnings about settings without effect) from a recipe and `TABLE.KEY=VALUE` overrides.

    `recipe` is a file or the name of a shipped recipe. Relative paths in it start at its folder, those in overrides
    at the working directory. ConfigError when it is missing or not valid TOML, or a key is unknown, missing or of
    the wrong type.
    """
    path = find_recipe(recipe)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not valid TOML: {error}") from None
    preset = tables.pop("preset", None)
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise ConfigError(f"preset is {preset!r}: expected one of {', '.join(PRESETS)}")
    _resolve_paths(tables, path.parent)
    for text in overrides:
        apply_override(tables, text)
    given = {f"{name}.{key}" for name, table in tables.items() if isinstance(table, dict) for key in table}
    config = build(Config, merge(PRESETS.get(preset or "", {}), tables))
    without_effect = [(key, why) for key, applies, why in _WITHOUT_EFFECT if key in given and applies(config)]
    return config, [f"{key} has no effect: {why}" for key, why in without_effect]


def list_recipes() -> dict[str, Path]:
    """The shipped recipes' files, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}


def find_recipe(recipe: str | Path) -> Path:
    """The recipe's file: `recipe` itself, or the shipped one of that name. ConfigError that names them."""
    if Path(recipe).is_file():
        return Path(recipe)
    shipped = list_recipes()
    if str(recipe) not in shipped:
        hint = did_you_mean(str(recipe), shipped) or f"expected a TOML file or one of {', '.join(shipped)}"
        raise ConfigError(f"there is no recipe {str(recipe)!r}: {hint}")
    return shipped[str(recipe)]


def _has_splits(path: str) -> bool:
    return path.startswith("hub:") or ".json" in Path(path.lower()).suffixes


def _resolve_paths(tables: Tables, folder: Path) -> None:
    """Let the recipe's relative paths start at its folder."""

    def resolve(text: object) -> object:
        return str(folder / text) if isinstance(text, str) and not text.startswith(SOURCES) else text

    data, model = tables.get("data"), tables.get("model")
    if isinstance(data, dict):
        if "path" in data:
            data["path"] = resolve(data["path"])
        if isinstance(data.get("mix"), dict):
            data["mix"] = {resolve(path): share for path, share in data["mix"].items()}
        if isinstance(data.get("against"), list):
            data["against"] = [resolve(path) for path in data["against"]]
    if isinstance(model, dict) and str(model.get("template", "")).endswith((".jinja", ".j2")):
        model["template"] = resolve(model["template"])
