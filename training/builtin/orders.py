"""The task set: read an order e-mail, answer with one JSON object of fixed shape.

    python -m training.builtin.orders    # print three rows of each split

    {"customer": "Ada Holm", "items": [{"name": "oak stool", "qty": 3}], "date": "14 March"}

Rows are drawn by a seed from `data/orders.json`. The held-out split shares no sentence, item style,
name or word of a product with training (tests/training/test_orders.py).
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

INSTRUCTION = "Turn this order into JSON.\n\n"
"""Opens every order prompt and distinguishes it from other questions."""


@dataclass(frozen=True, slots=True)
class OrderRow:
    """One e-mail and its one right answer."""

    prompt: str
    """The user turn: the instruction and the e-mail."""
    answer: str
    """Compact JSON: customer, items (name, qty) in the order of the e-mail, date."""


@dataclass(frozen=True, slots=True)
class Pool:
    """What the rows of one split are drawn from: words, and parts of e-mails.

    Names and products are words that are single tokens of the default base, with and without a leading space: a small
    model cannot spell, inside JSON quotes, a word it only knows as one token.
    """

    first: Sequence[str]
    last: Sequence[str]
    kinds: Sequence[str]
    things: Sequence[str]
    """A product is a kind and a thing."""
    styles: Sequence[str]
    """One ordered item, from {qty} and {name}."""
    opens: Sequence[str]
    opens_named: Sequence[str]
    """Greetings, without and with the customer's {name}; both may hold a meaningless {number}."""
    asks: Sequence[str]
    asks_dated: Sequence[str]
    """The order, from {items}, without and with the {date}."""
    whens: Sequence[str]
    closes: Sequence[str]
    closes_named: Sequence[str]


MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)


@cache
def read_pools() -> Mapping[Split, Pool]:
    """The pools of `data/orders.json`, read on first use."""
    pools = json.loads((Path(__file__).parent / "data/orders.json").read_text(encoding="utf-8"))
    return {split: Pool(**pool) for split, pool in pools.items()}


def draw_orders(count: int, *, split: Split = "train", seed: int = 0) -> list[OrderRow]:
    """`count` distinct rows of one split; the same seed gives the same rows."""
    rng = random.Random(f"{split}:{seed}")
    rows: dict[str, OrderRow] = {}
    while len(rows) < count:
        row = _draw_row(read_pools()[split], rng)
        rows.setdefault(row.prompt, row)
    return list(rows.values())


def _draw_email(pool: Pool, rng: random.Random) -> str:
    """A template with {items}, {date} and {name} once each, perhaps a {number}; parts joined by spaces or lines."""
    named_first, dated = rng.random() < 0.5, rng.random() < 0.5
    parts = [rng.choice(pool.opens_named if named_first else pool.opens)]
    parts += [rng.choice(pool.asks_dated)] if dated else [rng.choice(pool.asks), rng.choice(pool.whens)]
    parts.append(rng.choice(pool.closes if named_first else pool.closes_named))
    return rng.choice((" ", "\n", "\n\n")).join(part for part in parts if part)


def _draw_row(pool: Pool, rng: random.Random) -> OrderRow:
    """One row: one to three different products, quantities 1 to 40."""
    customer = f"{rng.choice(pool.first)} {rng.choice(pool.last)}"
    things = rng.sample(pool.things, rng.choice((1, 2, 2, 3)))
    items = [{"name": f"{rng.choice(pool.kinds)} {thing}", "qty": rng.randint(1, 40)} for thing in things]
    date = f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"
    style = rng.choice(pool.styles)
    listed = [style.format(**item) for item in items]
    text = " and ".join([", ".join(listed[:-1]), listed[-1]] if listed[1:] else listed)
    number = rng.randint(1000, 9999)
    email = _draw_email(pool, rng).format(items=text, date=date, name=customer, number=number)
    answer = json.dumps({"customer": customer, "items": items, "date": date})
    return OrderRow(INSTRUCTION + email, answer)


if __name__ == "__main__":
    for name in read_pools():
        for example in draw_orders(3, split=name):
            print(f"[{name}] {example.prompt}\n{example.answer}\n")
