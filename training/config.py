"""Configuration of a training run: frozen dataclasses with defaults, and the presets that recipes build on."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_type_hints

from training.toml import Tables, build, check, to_plain

SOURCES = ("hub:", "orders:", "safety:")
"""Prefixes of data.path that do not name a file."""
SOURCE_HELP = "a file, hub:NAME, orders:N, safety:train or safety:heldout"
COLUMN_PARTS = ("messages", "prompt", "answer", "context", "system", "history", "tools", "label")
"""What data.columns can name the column of."""
Precision = Literal["fp32", "bf16", "bf16-mixed", "fp16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The base model."""

    base: str
    """A Hugging Face folder, the name of one in .cache/base, or a name on the hub."""
    template: str = ""
    """Chat template for a base that has none: chatml, llama2, or a file with a Jinja template."""
    quantize: Literal["none", "4bit"] = "none"
    """4bit: QLoRA (NF4, double quantization); needs bitsandbytes and a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Shape of the adapter: ΔW = s·B·A with s = alpha/r, or alpha/√r with rsLoRA."""

    r: int = 8
    """Rank of A and B."""
    alpha: float = 16
    """Numerator of the scaling s."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Last part of the names of the linear layers that get an adapter; "all-linear" for all but the output."""
    dropout: float = 0.0
    """Share of the adapter's inputs set to zero in training."""
    rslora: bool = False
    """Rank-stabilized LoRA: s = alpha/√r (https://arxiv.org/abs/2312.03732)."""
    answer_only: bool = False
    """The adapter acts from the prompt's last token on, which predicts the answer's first; the base alone computes
    everything before it, so that all such adapters and their fusions share one cached prompt."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the exported factors."""

    def __post_init__(self) -> None:
        check(1 <= self.r <= 512, "lora.r", self.r, "1 to 512")
        check(self.alpha > 0, "lora.alpha", self.alpha, "more than 0")
        check(bool(self.targets), "lora.targets", self.targets, 'layers such as "q_proj", or "all-linear"')
        check(0 <= self.dropout < 1, "lora.dropout", self.dropout, "0 or more and less than 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which rows are trained on."""

    path: str
    """A file; `hub:NAME`, a data set on the Hugging Face hub; `orders:N`, N generated order e-mails; `safety:train` or
    `safety:heldout`, the built-in safety rows."""
    format: str = "auto"
    """auto, or one of training.rows.formats.FORMATS."""
    columns: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Column of a part of the chat in data.path, in place of those that are recognized: {prompt = "question"}. The
    parts are messages, prompt, answer, context, system, history, tools and label; "" uses no column for a part."""
    strict: bool = False
    """Refuse data with rows that cannot be read, instead of leaving these out."""
    split: str = "train"
    """Which split of a data set on the hub is read; of a JSON file that is an object, the key of the rows."""
    filter: Literal["all", "safety", "no_safety"] = "all"
    """Keep only rows that mention safety, or only those that do not (training.rows.keywords)."""
    rows: int = 0
    """Maximum number of rows, drawn by seed; 0: all."""
    mix: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Further sources, each with its share of all rows: {"safety.jsonl" = 0.03}."""
    weights: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Loss weight of rows whose last answer starts with a key, the first that matches: {"I'm sorry" = 2.0}."""
    validation: float = 0.0
    """Share of the rows held out; their loss is reported after every epoch."""
    max_tokens: int = 512
    """Maximum tokens of a row, its prompt included."""
    too_long: Literal["refuse", "drop", "cut"] = "refuse"
    """What happens to longer rows; cut keeps the beginning."""
    against: tuple[str, ...] = ()
    """Evaluation files or folders that the rows must not overlap with."""
    allow_overlap: bool = False
    """Report such an overlap instead of ending the run."""
    seed: int = 0
    """Seed of the rows drawn, mixed in and held out, and of generated rows."""

    def __post_init__(self) -> None:
        check(bool(self.path), "data.path", self.path, SOURCE_HELP)
        check(self.rows >= 0, "data.rows", self.rows, "0 (all) or more")
        check(0 <= self.validation < 1, "data.validation", self.validation, "0 or more and less than 1")
        check(self.max_tokens > 1, "data.max_tokens", self.max_tokens, "2 or more")
        valid = all(0 < share < 1 for share in self.mix.values()) and sum(self.mix.values()) < 1
        check(valid, "data.mix", dict(self.mix), "shares above 0 that leave room for data.path below 1")
        for part in self.columns:
            check(part in COLUMN_PARTS, "a key of data.columns", part, f"one of {', '.join(COLUMN_PARTS)}")
        valid = "messages" not in self.columns or not {"prompt", "answer"} & self.columns.keys()
        check(valid, "data.columns", dict(self.columns), "messages, or prompt and answer, not both")
        positive = all(weight > 0 for weight in self.weights.values())
        check(positive, "data.weights", dict(self.weights), "numbers above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The optimization: AdamW on the mean loss of the answer tokens of the whole step."""

    epochs: int = 1
    """Passes over all rows."""
    batch_rows: int = 8
    """Rows per optimizer step, over all processes."""
    micro_tokens: int = 2048
    """Maximum tokens per forward pass of a process; gradients are accumulated over the passes of a step."""
    pack: bool = True
    """Pack rows side by side, none attending to another; otherwise pad them to the longest of the pass."""
    learning_rate: float = 2e-4
    """Highest rate, reached at the end of the warm-up."""
    schedule: Literal["cosine", "linear", "constant", "step"] = "cosine"
    decay: float = 0.85
    """Factor of the rate after every epoch, for schedule = "step"."""
    warmup: float = 0.05
    """Share of all steps over which the rate rises from zero."""
    weight_decay: float = 0.0
    """Decoupled decay of the adapter's factors, as in AdamW."""
    clip_norm: float = 1.0
    """Maximum norm of the gradients; 0: no clipping."""
    weight_range: tuple[float, ...] = (1.0, 1.0)
    """Each step the adapter acts at a weight drawn uniformly from [low, high], so that it keeps its effect when it is
    later fused at a weight below 1."""
    opening_weight: float = 1.0
    """Weight in the loss of an answer's first `opening_tokens` tokens, relative to later ones. Above 1 where the point
    is whether to answer at all: a refusal is decided in its first tokens (Qi et al., Safety Alignment Should Be Made
    More Than Just a Few Tokens Deep, ICLR 2025), otherwise a small part of the loss."""
    opening_tokens: int = 3
    """Tokens at the start of an answer that `opening_weight` applies to."""
    max_steps: int = 0
    """Steps after which the run ends; 0: after the epochs."""
    seed: int = 0
    """Seed of the factors, the order of the rows, dropout and the weights of `weight_range`."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_rows", "micro_tokens", "opening_tokens"):
            check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        check(self.max_steps >= 0, "train.max_steps", self.max_steps, "0 (no limit) or more")
        check(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "more than 0")
        check(0 < self.decay <= 1, "train.decay", self.decay, "more than 0, at most 1")
        check(0 <= self.warmup < 1, "train.warmup", self.warmup, "0 or more and less than 1")
        check(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or more")
        check(self.clip_norm >= 0, "train.clip_norm", self.clip_norm, "0 (none) or more")
        check(self.opening_weight > 0, "train.opening_weight", self.opening_weight, "more than 0")
        limits = self.weight_range
        valid = len(limits) == 2 and 0 < limits[0] <= limits[1]
        check(valid, "train.weight_range", list(limits), "[low, high] with 0 < low <= high")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Precision and memory."""

    precision: Precision = "fp32"
    """bf16: everything in bf16; bf16-mixed: base in bf16, adapter and optimizer in fp32; fp16: likewise, with a loss
    scale."""
    checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute activations in the backward pass: of every layer, or of every `selective_every`th."""
    selective_every: int = 2
    """Distance of the layers that selective checkpointing recomputes."""
    cpu_offload: bool = False
    """Keep parameters in CPU memory between uses (FSDP)."""
    optimizer: Literal["adamw", "adamw-bf16"] = "adamw"
    """adamw-bf16 keeps its moments in bf16, with compensated updates where the parameters are bf16."""

    def __post_init__(self) -> None:
        check(self.selective_every >= 2, "policy.selective_every", self.selective_every, "2 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints to resume from, in the run's folder."""

    every: int = 50
    """Steps between checkpoints, the most a kill can lose; 0: only at the end. Writing overlaps the next step."""
    keep: int = 2
    """How many of the newest checkpoints are kept."""

    def __post_init__(self) -> None:
        check(self.every >= 0, "checkpoint.every", self.every, "0 (only at the end) or more")
        check(self.keep >= 1, "checkpoint.keep", self.keep, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Where the metrics go besides the progress bar and metrics.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard events into the run's folder."""
    wandb: bool = False
    """Log to Weights & Biases, over the network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a run."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    policy: PolicyConfig = PolicyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


PRESETS: Mapping[str, dict[str, dict[str, object]]] = {
    # The paper's hyperparameters; there, rows were padded, gradients unclipped, and the base 8-bit.
    "paper": {
        "lora": {"r": 8, "alpha": 32, "targets": ["q_proj", "v_proj"], "dropout": 0.05},
        "train": {"epochs": 10, "batch_rows": 4, "learning_rate": 1e-3, "schedule": "step", "decay": 0.85}
        | {"warmup": 0.0, "clip_norm": 0.0},
    },
    "modern": {
        "lora": {"r": 16, "alpha": 16, "targets": ["all-linear"], "rslora": True},
        "train": {"epochs": 2, "learning_rate": 2e-4, "schedule": "cosine", "warmup": 0.05},
    },
}


def from_json(content: Tables) -> Config:
    """The configuration that `to_json` wrote."""
    return build(Config, content)


def to_json(config: Config) -> Tables:
    """Every setting, in JSON types."""
    content: Tables = json.loads(json.dumps(to_plain(config)))
    return content


def list_settings() -> list[tuple[str, str]]:
    """Every setting as `table.key`, with its default as TOML would write it."""
    settings = []
    for table, cls in get_type_hints(Config).items():
        for one in dataclasses.fields(cls):
            value = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
            text = "(required)" if value is dataclasses.MISSING else json.dumps(to_plain(value))
            settings.append((f"{table}.{one.name}", text))
    return settings
