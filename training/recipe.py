"""What a training run is: a TOML recipe read into frozen dataclasses. Unknown keys are errors."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints


class RecipeError(ValueError):
    """A recipe that cannot be run; the message says which key and what was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Shape of the LoRA adapter."""

    base: str
    """Name of the base; written into the adapter as ``base_model_name_or_path``."""
    rank: int
    alpha: int
    """The update is (alpha / rank)·B·A."""
    targets: tuple[str, ...]
    """Last part of the names of the linear layers that get an adapter."""
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the saved factors; training itself is in float32."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"adapter.rank is {self.rank!r}; expected 1 or more")
        if self.dtype not in ("float32", "bfloat16"):
            raise RecipeError(f'adapter.dtype is {self.dtype!r}; expected "float32" or "bfloat16"')
        if not self.targets:
            raise RecipeError('adapter.targets is empty; name layers such as "q_proj"')


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where the rows come from."""

    source: Literal["orders", "jsonl"]
    """`orders`: made by training.orders; `jsonl`: a file of {"prompt", "answer"} objects."""
    path: str = ""
    """For `jsonl`; relative to the recipe file."""
    rows: int = 0
    """How many to make (`orders`), or at most to use (`jsonl`; 0 is all)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.source not in ("orders", "jsonl"):
            raise RecipeError(f'data.source is {self.source!r}; expected "orders" or "jsonl"')
        if self.source == "jsonl" and not self.path:
            raise RecipeError('data.path is missing; source = "jsonl" needs one')
        if self.source == "orders" and self.rows < 1:
            raise RecipeError('data.rows is missing; source = "orders" needs a row count')


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How the adapter is trained: AdamW, cosine to zero after a linear warm-up."""

    epochs: int
    learning_rate: float
    batch_rows: int = 8
    max_tokens: int = 512
    """Longer rows are refused, not cut."""
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    weight_range: tuple[float, ...] = (1.0, 1.0)
    """Each step the adapter acts at a weight drawn evenly from here, so that it keeps its effect
    when it is later fused at less than weight 1."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_rows < 1:
            raise RecipeError("training.epochs and training.batch_rows must be 1 or more")
        if self.learning_rate <= 0:
            raise RecipeError(f"training.learning_rate is {self.learning_rate!r}; expected > 0")
        if len(self.weight_range) != 2 or not 0 < self.weight_range[0] <= self.weight_range[1]:
            raise RecipeError(f"training.weight_range is {self.weight_range!r}; expected [low, high], 0 < low")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole run: three tables of a TOML file."""

    adapter: AdapterConfig
    data: DataConfig
    training: TrainingConfig


Config = TypeVar("Config")


def convert(value: object, hint: Any, where: str) -> object:
    """Check one TOML value against a field's type; ints pass as floats, lists become tuples."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise RecipeError(f"{where} is {value!r}; expected a table [{where}]")
        return build(hint, value, where)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise RecipeError(f"{where} is {value!r}; expected a list")
        inner = get_args(hint)[0]
        return tuple(convert(item, inner, f"{where}[{i}]") for i, item in enumerate(value))
    expected = str if get_origin(hint) is Literal else hint
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or isinstance(value, bool):
        raise RecipeError(f"{where} is {value!r}; expected a {expected.__name__}")
    return value


def build(cls: type[Config], table: dict[str, object], where: str = "") -> Config:
    """Make a config from a TOML table; an unknown key is refused with the nearest known one."""
    prefix = f"{where}." if where else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            raise RecipeError(f"unknown key {prefix + key!r}; did you mean {prefix + near[0]!r}?")
    for name, field in fields.items():
        if name not in table and field.default is dataclasses.MISSING:
            raise RecipeError(f"key {prefix + name!r} is missing")
    hints = get_type_hints(cls)
    given: dict[str, Any] = {k: convert(v, hints[k], prefix + k) for k, v in table.items()}
    return cls(**given)


def load(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: the file is missing, is not TOML, or a key is unknown, missing or ill-typed.
    """
    try:
        with path.open("rb") as file:
            return build(Recipe, tomllib.load(file))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {str(path)!r}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{str(path)!r} is not TOML: {error}") from None
