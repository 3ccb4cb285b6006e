"""How a gate is trained."""

from dataclasses import dataclass

from training.toml import check

REFUSALS = ("I'm sorry", "I’m sorry", "I am sorry", "Sorry", "I can't", "I can’t", "I cannot", "I won't", "I won’t")
"""What answers begin with that refuse."""
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """Settings of a gate's training; the defaults are those of the gate that ships."""

    base: str = "smollm2-135m-instruct"
    """A Hugging Face folder, the name of one in .cache/base, or a name on the hub."""
    template: str = ""
    """Chat template for a base that has none."""
    data: str = "safety:train"
    """Rows to learn from, as `data.path` of a training recipe: a row is dangerous when its answer is a refusal."""
    held_out: str = ""
    """Rows to calibrate on; empty: safety:heldout for safety:train, else a tenth of the rows."""
    refusals: tuple[str, ...] = REFUSALS
    """What answers begin with that refuse."""
    rows: int = 0
    """Maximum number of rows, drawn by seed; 0: all."""
    max_tokens: int = 512
    """Maximum tokens of a prompt."""
    rank: int = 1
    """Rank of the LoRA; one number per module is enough for one value."""
    targets: tuple[str, ...] = ALL_LINEAR
    """Last part of the names of the layers that it changes."""
    yes: str = " yes"
    """Text of one token, whose probability dangerous prompts raise."""
    no: str = " no"
    """Likewise, for harmless prompts."""
    epochs: int = 3
    batch_rows: int = 32
    learning_rate: float = 2e-3
    dropout: float = 0.1
    weight_decay: float = 0.01
    recall: float = 0.0
    """0: the gate's share is the probability that a prompt is dangerous. Else the share is 1/2 where this part of the
    dangerous prompts held out lies above."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "batch_rows"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        check(self.rows >= 0, "rows", self.rows, "0 (all) or more")
        check(self.max_tokens >= 2, "max_tokens", self.max_tokens, "2 or more")
        check(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        check(0 <= self.dropout < 1, "dropout", self.dropout, "0 or more and less than 1")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        check(0 <= self.recall < 1, "recall", self.recall, "0 (calibrated) or more and less than 1")
        check(bool(self.targets), "targets", self.targets, "names of layers")
        check(bool(self.refusals) and all(self.refusals), "refusals", self.refusals, "beginnings of answers")
