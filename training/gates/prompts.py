"""Labeled prompts, which a gate learns from: rows of a data set, dangerous where their answer is a refusal."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.config import DataConfig
from training.errors import ConfigError
from training.gates.config import REFUSALS, GateConfig
from training.rows.dataset import collect_chats, digest
from training.rows.encoding import encode
from training.rows.readers import show_rows
from training.rows.shapes import Ledger

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """The tokens of a chat up to its last answer, with what opens the answer: `ids` int32."""

    ids: NDArray[np.int32]
    dangerous: bool


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of one source; `sha256` is of its rows."""

    source: str
    items: tuple[Prompt, ...]
    sha256: str = ""
    left_out: tuple[str, ...] = ()
    """The rows that no prompt was made of, each with the reason."""

    @property
    def labels(self) -> NDArray[np.bool_]:
        """Which are dangerous, one per prompt."""
        return np.array([prompt.dangerous for prompt in self.items], bool)

    def describe(self) -> str:
        """How many there are of each kind."""
        dangerous = int(self.labels.sum())
        left_out = (
            f"; {len(self.left_out)} rows are left out: {show_rows(list(self.left_out))}" if self.left_out else ""
        )
        return f"{self.source}: {dangerous} dangerous, {len(self.items) - dangerous} harmless{left_out}"


def read_prompts(config: DataConfig, tokenizer: Any, refusals: Sequence[str] = REFUSALS) -> Prompts:
    """All prompts of `config`, rendered by the tokenizer's chat template; those whose answer begins with one of
    `refusals` are dangerous. ConfigError for a prompt over `config.max_tokens`, and for what cannot be read.
    """
    ledger = Ledger()
    chats = collect_chats(config, ledger)
    prompts = []
    for chat in chats:
        row = encode(tokenizer, chat)
        targets = np.flatnonzero(row.is_target)
        if not len(targets):
            raise ConfigError(f"{chat.where} has no answer: a gate learns from which answers are refusals")
        # The last answer begins where the last run of targets does.
        start = targets[np.flatnonzero(np.diff(targets, prepend=-2) != 1)[-1]]
        if start > config.max_tokens:
            raise ConfigError(f"{chat.where} has a prompt of {start} tokens: expected at most {config.max_tokens}")
        prompts.append(Prompt(row.ids[:start], chat.answer.lstrip().startswith(tuple(refusals))))
    return Prompts(config.path, tuple(prompts), digest(chats), tuple(ledger.left_out))


def check_kinds(prompts: Prompts) -> None:
    """ConfigError unless there are prompts of both kinds."""
    if len(set(prompts.labels.tolist())) < 2:
        kind = "dangerous" if prompts.labels.all() else "harmless"
        raise ConfigError(
            f"all {len(prompts.items)} prompts of {prompts.source!r} are {kind}: expected some whose answers begin "
            "with a refusal and some whose do not; --refusal says how refusals begin"
        )


def read_both(config: GateConfig, tokenizer: Any) -> tuple[Prompts, Prompts]:
    """The prompts to learn from, and those held out; ConfigError unless both have both kinds."""
    data = DataConfig(path=config.data, rows=config.rows, max_tokens=config.max_tokens, seed=config.seed)
    rows = read_prompts(data, tokenizer, config.refusals)
    source = config.held_out or ("safety:heldout" if config.data == "safety:train" else "")
    if source:
        held = read_prompts(replace(data, path=source, rows=0), tokenizer, config.refusals)
        known = {prompt.ids.tobytes() for prompt in held.items}
        rows = replace(rows, items=tuple(prompt for prompt in rows.items if prompt.ids.tobytes() not in known))
    else:
        rows, held = hold_out(rows, config.seed)
    for prompts in (rows, held):
        check_kinds(prompts)
    return rows, held


def hold_out(rows: Prompts, seed: int) -> tuple[Prompts, Prompts]:
    """All but a tenth of the prompts of each kind, and that tenth; the same prompt is never in both."""
    by_text: dict[bytes, list[Prompt]] = {}
    for prompt in rows.items:
        by_text.setdefault(prompt.ids.tobytes(), []).append(prompt)
    rest: list[Prompt] = []
    held: list[Prompt] = []
    for dangerous in (True, False):
        groups = [group for group in by_text.values() if group[0].dangerous == dangerous]
        random.Random(f"held out/{seed}").shuffle(groups)
        count = max(1, round(HELD_OUT_SHARE * len(groups)))
        for part, chosen in ((held, groups[:count]), (rest, groups[count:])):
            part += [prompt for group in chosen for prompt in group]
    return replace(rows, items=tuple(rest)), replace(
        rows, items=tuple(held), source=f"{rows.source} (a tenth)", left_out=()
    )
