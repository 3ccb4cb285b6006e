"""The `task` job: read an order e-mail, answer with one JSON object of fixed shape.

    python -m training.orders            # print three rows of each split

    {"customer": "Ada Holm", "items": [{"name": "oak stool", "qty": 3}], "date": "14 March"}

Rows are drawn by a seed from `data/orders.json`. The held-out split shares no sentence, item style,
name or word of a product with training (tests/training/test_orders.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

INSTRUCTION = "Turn this order into JSON.\n\n"
"""Opens every order prompt; tells an order from any other question."""


@dataclass(frozen=True, slots=True)
class OrderRow:
    """One e-mail and its one right answer."""

    prompt: str
    """What the user sends: the instruction and the e-mail."""
    answer: str
    """Compact JSON: customer, items (name, qty) in the order of the e-mail, date."""


@dataclass(frozen=True, slots=True)
class Pool:
    """What the rows of one split are drawn from: words, and parts that an e-mail is put together from.

    Names and products are words that the default base's tokenizer has whole, with and without a space
    before: a small model cannot spell, inside JSON quotes, a word it only knows as one token.
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
    """Greetings, without and with the customer's {name}; both may hold a {number} of no meaning."""
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


def read_pools(path: Path) -> dict[Split, Pool]:
    """Both pools from their JSON file."""
    pools = json.loads(path.read_text(encoding="utf-8"))
    return {"train": Pool(**pools["train"]), "heldout": Pool(**pools["heldout"])}


POOLS = read_pools(Path(__file__).parent / "data" / "orders.json")


def write_email(pool: Pool, rng: random.Random) -> str:
    """An e-mail with {items}, {date} and {name} once each, perhaps a {number}; joined by spaces or lines."""
    named_first, dated = rng.random() < 0.5, rng.random() < 0.5
    parts = [rng.choice(pool.opens_named if named_first else pool.opens)]
    parts += [rng.choice(pool.asks_dated)] if dated else [rng.choice(pool.asks), rng.choice(pool.whens)]
    parts.append(rng.choice(pool.closes if named_first else pool.closes_named))
    return rng.choice((" ", "\n", "\n\n")).join(part for part in parts if part)


def make_row(pool: Pool, rng: random.Random) -> OrderRow:
    """Draw one row: one to three different products, quantities 1 to 40."""
    customer = f"{rng.choice(pool.first)} {rng.choice(pool.last)}"
    things = rng.sample(pool.things, rng.choice((1, 2, 2, 3)))
    items = [{"name": f"{rng.choice(pool.kinds)} {thing}", "qty": rng.randint(1, 40)} for thing in things]
    date = f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"
    style = rng.choice(pool.styles)
    listed = [style.format(**item) for item in items]
    text = " and ".join([", ".join(listed[:-1]), listed[-1]] if listed[1:] else listed)
    number = rng.randint(1000, 9999)
    email = write_email(pool, rng).format(items=text, date=date, name=customer, number=number)
    answer = json.dumps({"customer": customer, "items": items, "date": date})
    return OrderRow(INSTRUCTION + email, answer)


def orders(count: int, *, split: Split = "train", seed: int = 0) -> list[OrderRow]:
    """``count`` different rows of one split; the same seed gives the same rows."""
    rng = random.Random(f"{split}:{seed}")
    rows: dict[str, OrderRow] = {}
    while len(rows) < count:
        row = make_row(POOLS[split], rng)
        rows.setdefault(row.prompt, row)
    return list(rows.values())


if __name__ == "__main__":
    for name in POOLS:
        for example in orders(3, split=name):
            print(f"[{name}] {example.prompt}\n{example.answer}\n")
