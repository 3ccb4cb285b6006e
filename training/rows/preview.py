"""Rows as the model will see them, each token with or without a loss."""

from itertools import groupby
from typing import Any

from training.rows.encoding import Row

MASK = "⟨⟩"
"""Enclose what has no loss."""
MAX_CHARACTERS = 2000
"""How much of a stretch of text is printed."""


def split_row(row: Row, tokenizer: Any) -> list[dict[str, Any]]:
    """The row's text in stretches, {text, tokens, learned}, as JSON can hold it."""
    stretches = []
    for learned, tokens in groupby(zip(row.ids.tolist(), row.is_target.tolist(), strict=True), lambda token: token[1]):
        ids = [number for number, _ in tokens]
        stretches.append({"text": tokenizer.decode(ids), "tokens": len(ids), "learned": learned})
    return stretches


def print_row(row: Row, tokenizer: Any) -> str:
    """The row's text for the terminal, what has no loss in ⟨ and ⟩, and control characters escaped."""
    text = ""
    for stretch in split_row(row, tokenizer):
        content = "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in stretch["text"])
        if len(content) > MAX_CHARACTERS:
            half = MAX_CHARACTERS // 2
            content = f"{content[:half]} […] {content[-half:]}"
        text += content if stretch["learned"] else f"{MASK[0]}{content}{MASK[1]}"
    weight = f", weight {row.weight:g}" if row.weight != 1 else ""
    return f"--- {row.where}: {int(row.is_target.sum())} of {len(row.ids)} tokens are learned{weight}\n{text}"
