"""The `task` job: read an order e-mail, answer with one JSON object of fixed shape.

    python -m training.orders            # print three rows of each split

    {"customer": "Ada Holm", "items": [{"name": "oak stool", "qty": 3}], "date": "14 March"}

Rows are drawn by a seed from `data/orders.json`. The held-out split shares no sentence template,
item style, first name, last name or product with training (tests/training/test_orders.py).
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
    """What the rows of one split are drawn from."""

    first: Sequence[str]
    last: Sequence[str]
    products: Sequence[str]
    templates: Sequence[Sequence[str]]
    """(item style, e-mail); the e-mail has {items}, {date}, {name}, perhaps {number}."""
    coined: float = 0.0
    """Share of the rows with made-up words in their names."""


SYLLABLES = (
    *("bran", "tuk", "ves", "lor", "mip", "dov", "zan", "kel", "grin", "plo", "shu", "tre", "fal"),
    *("nox", "wim", "jur", "hask", "cid", "bep", "quo", "ath", "sny", "rud", "gle", "oon", "iv"),
)

MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)


def read_pools(path: Path) -> dict[Split, Pool]:
    """Both pools from their JSON file.

    Training pairs every kind with every thing ("oak stool", "oak mug", …) and coins words: with few
    products and names the adapter would learn them by heart instead of learning to copy.
    """
    pools = json.loads(path.read_text(encoding="utf-8"))
    train = pools["train"]
    kinds, things = train.pop("kinds"), train.pop("things")
    train["products"] = [f"{kind} {thing}" for kind in kinds for thing in things]
    return {"train": Pool(**train, coined=0.5), "heldout": Pool(**pools["heldout"])}


POOLS = read_pools(Path(__file__).parent / "data" / "orders.json")


def coin(rng: random.Random) -> str:
    """A word that no language has."""
    return "".join(rng.sample(SYLLABLES, rng.choice((2, 2, 3))))


def make_row(pool: Pool, rng: random.Random) -> OrderRow:
    """Draw one row: one to three different products, quantities 1 to 40."""
    first, last = rng.choice(pool.first), rng.choice(pool.last)
    names = rng.sample(pool.products, rng.choice((1, 2, 2, 3)))
    if rng.random() < pool.coined:
        first, last = (coin(rng).capitalize() if rng.random() < 0.7 else word for word in (first, last))
        names = [" ".join(coin(rng) if rng.random() < 0.5 else w for w in name.split()) for name in names]
    customer = f"{first} {last}"
    style, template = rng.choice(pool.templates)
    items = [{"name": name, "qty": rng.randint(1, 40)} for name in names]
    date = f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"
    listed = [style.format(**item) for item in items]
    text = " and ".join([", ".join(listed[:-1]), listed[-1]] if listed[1:] else listed)
    email = template.format(items=text, date=date, name=customer, number=rng.randint(1000, 9999))
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


def grade(answer: str, row: OrderRow) -> bool:
    """True when ``answer`` is one JSON object equal to the row's; spacing and key order are free.

    Text around the object, a duplicate key, a quantity written as a string or float: all wrong.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("duplicate key")
        return found

    try:
        parsed = json.loads(answer.strip(), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return False
    # Compared as text: 3 == 3.0 == True in Python.
    wanted = json.loads(row.answer)
    return json.dumps(parsed, sort_keys=True) == json.dumps(wanted, sort_keys=True)


if __name__ == "__main__":
    for name in POOLS:
        for example in orders(3, split=name):
            print(f"[{name}] {example.prompt}\n{example.answer}\n")
