"""What a training run is: a TOML recipe, a preset below it and `--set` overrides on top, as frozen dataclasses.

Unknown keys are errors that name the nearest known one; `idle` names the settings that have no effect.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A run that cannot start; the message says which setting and what was expected."""


Precision = Literal["fp32", "bf16", "bf16-mixed", "fp16"]


def _check(right: bool, key: str, value: object, expected: str) -> None:
    if not right:
        raise ConfigError(f"{key} is {value!r}: expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The base model."""

    base: str
    """A Hugging Face folder, the name of one in .cache/base, or a name on the hub."""
    template: str = ""
    """Chat template for a base that has none: chatml, llama2, or a file with a Jinja template."""
    quantize: Literal["none", "4bit"] = "none"
    """4bit: QLoRA (NF4, double quantisation), where bitsandbytes and a GPU are present."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Shape of the adapter: ΔW = s·B·A with s = alpha/r, or alpha/√r with rsLoRA."""

    r: int = 8
    alpha: float = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Last part of the names of the linear layers that get an adapter; "all-linear" for all but the output."""
    dropout: float = 0.0
    rslora: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the exported factors."""

    def __post_init__(self) -> None:
        _check(1 <= self.r <= 512, "lora.r", self.r, "1 to 512")
        _check(self.alpha > 0, "lora.alpha", self.alpha, "more than 0")
        _check(bool(self.targets), "lora.targets", self.targets, 'layers such as "q_proj", or "all-linear"')
        _check(0 <= self.dropout < 1, "lora.dropout", self.dropout, "0 or more and less than 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The rows."""

    path: str
    """A file, `hub:NAME` of a data set on the Hugging Face hub, or `orders:N` for N generated order e-mails."""
    format: str = "auto"
    """auto, or one of training.readers.FORMATS."""
    split: str = "train"
    """Of a data set on the hub."""
    filter: Literal["all", "safety", "no_safety"] = "all"
    """Only rows that speak of safety, or only those that do not (training.keywords)."""
    rows: int = 0
    """At most so many, drawn by seed; 0 is all."""
    mix: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Further files, each with the share of all rows it makes up: {"safety.jsonl" = 0.03}."""
    weights: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Answers (the last of a chat) that begin with a text count so many times in the loss, by the first that fits:
    {"I'm sorry" = 2.0}."""
    validation: float = 0.0
    """Share of the rows kept aside; their loss is reported after every epoch."""
    max_tokens: int = 512
    too_long: Literal["refuse", "drop", "cut"] = "refuse"
    """What becomes of longer rows; cut keeps the beginning."""
    against: tuple[str, ...] = ()
    """Evaluation files or folders that the rows must not overlap with."""
    allow_overlap: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check(bool(self.path), "data.path", self.path, "a file, hub:NAME or orders:N")
        _check(self.rows >= 0, "data.rows", self.rows, "0 (all) or more")
        _check(0 <= self.validation < 1, "data.validation", self.validation, "0 or more and less than 1")
        _check(self.max_tokens > 1, "data.max_tokens", self.max_tokens, "2 or more")
        total = sum(self.mix.values())
        shares = all(0 < share < 1 for share in self.mix.values()) and total < 1
        _check(shares, "data.mix", dict(self.mix), "shares above 0 that leave room for data.path below 1")
        positive = all(weight > 0 for weight in self.weights.values())
        _check(positive, "data.weights", dict(self.weights), "numbers above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The loop: AdamW on the mean loss of the answer tokens of the whole step."""

    epochs: int = 1
    batch_rows: int = 8
    """Rows of one optimizer step, over all processes."""
    micro_tokens: int = 2048
    """At most so many tokens in one forward pass of one process; more rows are accumulated."""
    pack: bool = True
    """Rows side by side without padding, none seeing another; else padded to the longest of the pass."""
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "linear", "constant", "step"] = "cosine"
    decay: float = 0.85
    """Of schedule = "step": factor after every epoch."""
    warmup: float = 0.05
    """Share of all steps over which the rate rises from zero."""
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """0: no clipping."""
    weight_range: tuple[float, ...] = (1.0, 1.0)
    """Each step the adapter acts at a weight drawn evenly from here, so that it keeps its effect when it is
    later fused at less than weight 1."""
    opening_weight: float = 1.0
    """How much the first `opening_tokens` tokens of an answer count against each later one. More than 1 where the
    point is whether to answer at all: a refusal is decided in its first tokens (Qi et al., Safety Alignment Should Be
    Made More Than Just a Few Tokens Deep, ICLR 2025), a small part of the loss otherwise."""
    opening_tokens: int = 3
    max_steps: int = 0
    """Stop after so many; 0: after the epochs."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("batch_rows", 1),
            ("micro_tokens", 1),
            ("opening_tokens", 1),
            ("max_steps", 0),
        ):
            _check(getattr(self, name) >= least, f"train.{name}", getattr(self, name), f"{least} or more")
        _check(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "more than 0")
        _check(0 < self.decay <= 1, "train.decay", self.decay, "more than 0, at most 1")
        _check(0 <= self.warmup < 1, "train.warmup", self.warmup, "0 or more and less than 1")
        _check(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or more")
        _check(self.clip_norm >= 0, "train.clip_norm", self.clip_norm, "0 (none) or more")
        _check(self.opening_weight > 0, "train.opening_weight", self.opening_weight, "more than 0")
        range_ = self.weight_range
        right = len(range_) == 2 and 0 < range_[0] <= range_[-1]
        _check(right, "train.weight_range", list(range_), "[low, high] with 0 < low")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """How memory and numbers are handled."""

    precision: Precision = "fp32"
    """bf16: everything; bf16-mixed: base in bf16, adapter and optimizer in fp32; fp16: likewise, with a scaler."""
    checkpointing: Literal["none", "full", "selective"] = "none"
    """Activations computed again in the backward pass: of every layer, or of every `selective_every`th."""
    selective_every: int = 2
    cpu_offload: bool = False
    """Parameters wait in CPU memory between their uses (FSDP)."""
    optimizer: Literal["adamw", "adamw-bf16"] = "adamw"
    """adamw-bf16 keeps its states in bf16, with compensated updates where the parameters are bf16."""

    def __post_init__(self) -> None:
        _check(self.selective_every >= 2, "policy.selective_every", self.selective_every, "2 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints to resume from, in the run's folder."""

    every: int = 50
    """Steps, of which a kill loses at most so many; 0: none but the last. Writing overlaps the step after."""
    keep: int = 2

    def __post_init__(self) -> None:
        _check(self.every >= 0, "checkpoint.every", self.every, "0 (none but the last) or more")
        _check(self.keep >= 1, "checkpoint.keep", self.keep, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Where the numbers go besides the progress bar and metrics.jsonl."""

    tensorboard: bool = False
    wandb: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    policy: PolicyConfig = PolicyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


PRESETS: Mapping[str, dict[str, dict[str, object]]] = {
    # The reference's hyper-parameters; its rows were padded, its clipping absent, its base 8-bit.
    "paper": {
        "lora": {"r": 8, "alpha": 32, "targets": ["q_proj", "v_proj"], "dropout": 0.05},
        "train": {
            "epochs": 10,
            "batch_rows": 4,
            "learning_rate": 1e-3,
            "schedule": "step",
            "decay": 0.85,
            "warmup": 0.0,
            "clip_norm": 0.0,
        },
    },
    "modern": {
        "lora": {"r": 16, "alpha": 16, "targets": ["all-linear"], "rslora": True},
        "train": {"epochs": 2, "learning_rate": 2e-4, "schedule": "cosine", "warmup": 0.05},
    },
}

_IDLE: Sequence[tuple[str, Callable[[Config], bool], str]] = (
    ("train.decay", lambda c: c.train.schedule != "step", 'only train.schedule = "step" decays by it'),
    ("train.warmup", lambda c: c.train.warmup == 0, "it is 0"),
    ("train.opening_tokens", lambda c: c.train.opening_weight == 1, "train.opening_weight is 1"),
    ("data.split", lambda c: not c.data.path.startswith("hub:"), "data.path is not on the hub"),
    ("data.allow_overlap", lambda c: not c.data.against, "data.against names nothing"),
    ("policy.selective_every", lambda c: c.policy.checkpointing != "selective", "checkpointing is not selective"),
    ("data.format", lambda c: c.data.path.startswith("orders:"), "generated orders have one format"),
    ("train.epochs", lambda c: 0 < c.train.max_steps < c.train.epochs, "train.max_steps ends the run sooner"),
)

Made = TypeVar("Made")
Tables = dict[str, Any]


def load(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """(the run, warnings about settings without effect) from a recipe file and `key=value` texts.

    Relative paths in the recipe start at its folder, those in overrides where the command runs. ConfigError
    when the file is missing or no TOML, or a key is unknown, missing or of the wrong type.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {str(path)!r}: see training/recipes/ for some") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not TOML: {error}") from None
    preset = tables.pop("preset", None)
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise ConfigError(f"preset is {preset!r}: expected one of {', '.join(PRESETS)}")
    _relocate(tables, path.parent)
    for text in overrides:
        _override(tables, text)
    given = {f"{name}.{key}" for name, table in tables.items() if isinstance(table, dict) for key in table}
    config = build(Config, _merged(PRESETS.get(preset or "", {}), tables))
    return config, [f"{key} has no effect: {why}" for key, idle, why in _IDLE if key in given and idle(config)]


def restore(content: Tables) -> Config:
    """The configuration that `resolved` wrote."""
    return build(Config, content)


def resolved(config: Config) -> Tables:
    """Every setting, in JSON types."""
    content: Tables = json.loads(json.dumps(_plain(config)))
    return content


def defaults() -> list[tuple[str, str]]:
    """Every setting as `table.key` with its default as TOML would have it, for `--help`."""
    found = []
    for table, kind in get_type_hints(Config).items():
        for one in dataclasses.fields(kind):
            factory = one.default_factory
            value = one.default if factory is dataclasses.MISSING else factory()
            text = "(required)" if value is dataclasses.MISSING else json.dumps(_plain(value))
            found.append((f"{table}.{one.name}", text))
    return found


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return dict(value) if isinstance(value, Mapping) else value


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Tables:
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        merged[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def _relocate(tables: Tables, folder: Path) -> None:
    """Make the recipe's relative paths start at its folder."""

    def moved(text: object) -> object:
        if not isinstance(text, str) or text.startswith(("hub:", "orders:", "/")):
            return text
        return str(folder / text)

    data = tables.get("data")
    if isinstance(data, dict):
        if "path" in data:
            data["path"] = moved(data["path"])
        if isinstance(data.get("mix"), dict):
            data["mix"] = {moved(path): share for path, share in data["mix"].items()}
        if isinstance(data.get("against"), list):
            data["against"] = [moved(path) for path in data["against"]]
    model = tables.get("model")
    if isinstance(model, dict) and str(model.get("template", "")).endswith((".jinja", ".j2")):
        model["template"] = moved(model["template"])


def _override(tables: Tables, text: str) -> None:
    """Put `table.key=value` into the tables; the value is TOML, or a plain text."""
    path, equals, value = text.partition("=")
    table, dot, key = path.strip().partition(".")
    if not equals or not dot or not key:
        raise ConfigError(f"--set {text!r}: expected TABLE.KEY=VALUE such as lora.r=16")
    try:
        parsed: object = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    inner = tables.setdefault(table, {})
    if not isinstance(inner, dict):
        raise ConfigError(f"--set {text!r}: {table!r} is no table")
    inner[key] = parsed


def convert(value: object, hint: Any, where: str) -> object:
    """Check one TOML value against a field's type; whole numbers pass as floats, lists become tuples."""
    origin = get_origin(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}: expected a table [{where}]")
        return build(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} is {value!r}: expected a list")
        inner = get_args(hint)[0]
        return tuple(convert(item, inner, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        _check(value in get_args(hint), where, value, f"one of {', '.join(map(str, get_args(hint)))}")
        return value
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise ConfigError(f'{where} is {value!r}: expected a table such as {{"safety.jsonl" = 0.03}}')
        inner = get_args(hint)[1]
        return MappingProxyType({key: convert(item, inner, f"{where}.{key}") for key, item in value.items()})
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} is {value!r}: expected {_TYPES[hint]}")
    return value


_TYPES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def build(cls: type[Made], table: Mapping[str, object], where: str = "") -> Made:
    """Make a config from a TOML table; an unknown key is refused with the nearest known one."""
    prefix = f"{where}." if where else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # cls is a dataclass
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            raise ConfigError(f"unknown key {prefix + key!r}: did you mean {prefix + near[0]!r}?")
    for name, one in fields.items():
        if name not in table and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise ConfigError(f"key {prefix + name!r} is missing")
    hints = get_type_hints(cls)
    return cls(**{key: convert(value, hints[key], prefix + key) for key, value in table.items()})
