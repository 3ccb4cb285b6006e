"""The `task` job: read an order e-mail, answer with one JSON object of fixed shape.

    python -m training.orders            # print three rows of each split

    {"customer": "Ada Holm", "items": [{"name": "oak stool", "qty": 3}], "date": "14 March"}

Rows are made on the fly from a seed. The held-out split shares no sentence template, item style,
first name, last name or product with the training split (tests/training/test_orders.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
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
    templates: Sequence[tuple[str, str]]
    """(item style, e-mail); the e-mail has {items}, {date}, {name}, perhaps {number}."""


MONTHS = (
    "January February March April May June July August September October November December"
).split()

TRAIN = Pool(
    first=(
        "Ada Bruno Carla Dmitri Elena Farid Greta Hugo Irene Jonas Karin Luca Marta Nils Olga "
        "Pedro Quinn Rosa Stefan Tilda Umar Vera Walter Xenia Yusuf Zora Anton Bianca Cyrus Delia"
    ).split(),
    last=(
        "Holm Castell Ferrari Novak Lindqvist Okafor Brandt Pereira Sato Kowalski Moreau Haddad "
        "Jensen Petrov Vargas Weber Nakamura Costa Eriksen Rossi Dubois Kaplan Mendes Fischer Toth"
    ).split(),
    products=tuple(
        "oak stool,blue mug,wool blanket,desk lamp,steel kettle,garden hose,paper notebook,"
        "leather belt,cotton towel,glass vase,bread knife,rain jacket,camping tent,bike pump,"
        "yoga mat,wall clock,photo frame,soup bowl,tea strainer,door mat,pine shelf,copper pan,"
        "silk scarf,travel pillow,coffee grinder,water bottle,chess set,piano bench,sewing kit,"
        "paint brush,storage box,running sock,phone case,laptop sleeve,hand cream,olive dish,"
        "picnic basket,ceramic plate,bamboo tray,velvet cushion".split(",")
    ),
    templates=(
        ("{qty} x {name}", "Hello, I would like {items}. Please deliver by {date}. Thanks, {name}"),
        ("{qty} x {name}", "Hi team, could you send me {items} for {date}? Best, {name}"),
        ("{qty} {name}", "Please put me down for {items}, needed on {date}. Regards, {name}"),
        ("{qty} {name}", "My name is {name} and I want to order {items}. Date: {date}."),
        ("{name} ({qty})", "Order from {name}: {items}. We need it before {date}."),
        ("{name} ({qty})", "Good morning! {name} here. We are after {items} by {date}, please."),
        ("{qty} pcs {name}", "Dear shop, kindly reserve {items}. I pick up on {date}. {name}"),
        ("{qty} pcs {name}", "Order no. {number}\n{items}\nDelivery: {date}\nCustomer: {name}"),
        ("{name} x {qty}", "On {date} I need {items}. My number is {number}. Yours, {name}"),
        ("{name} x {qty}", "For {date}, please pack {items}. Bill it to {name}, ref {number}."),
    ),
)

HELDOUT = Pool(
    first="Noor Felix Ingrid Marco Sofia Tariq Leonie Pavel Yara Oscar Camille Rashid".split(),
    last="Winter Almeida Kimura Svensson Ortega Baumann Fontaine Iqbal Rahal Nowak".split(),
    products=tuple(
        "brass candle,linen apron,cork board,felt slipper,tin lantern,maple spoon,wire rack,"
        "clay pot,canvas bag,marble tile,rubber glove,stone mortar,denim cap,ivory button,"
        "bronze bell,plastic funnel".split(",")
    ),
    templates=(
        ("{qty}x {name}", "Hey, can I get {items} sent out by {date}? Cheers, {name}"),
        ("{qty}x {name}", "This is {name}. I'd love to buy {items}, arriving {date} at the latest."),
        ("{name}: {qty}", "New order\n{items}\nWanted on {date}\nSigned {name}"),
        ("{qty} of {name}", "Greetings! We require {items} no later than {date}. Sincerely, {name}"),
        ("{qty} of {name}", "It's {name} again (tel. {number}), I'll take {items} on {date}."),
    ),
)

POOLS: dict[Split, Pool] = {"train": TRAIN, "heldout": HELDOUT}


def make_row(pool: Pool, rng: random.Random) -> OrderRow:
    """Draw one row: one to three different products, quantities 1 to 40."""
    customer = f"{rng.choice(pool.first)} {rng.choice(pool.last)}"
    style, template = rng.choice(pool.templates)
    names = rng.sample(list(pool.products), rng.choice((1, 2, 2, 3)))
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
