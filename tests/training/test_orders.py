"""The order job: splits share nothing, the grader is exact."""

import json
from dataclasses import fields

import pytest
from hypothesis import given, strategies as st

from eval_clients.scoring.scorers import is_exact_match
from training.builtin.orders import INSTRUCTION, OrderRow, Pool, draw_orders, read_pools

TRAIN, HELDOUT = read_pools()["train"], read_pools()["heldout"]
ROW = OrderRow(
    "…",
    '{"customer": "Ada Holm", "items": [{"name": "oak stool", "qty": 3}], "date": "14 March"}',
)


@pytest.mark.parametrize("part", [field.name for field in fields(Pool)])
def test_heldout_words_and_sentences_are_new(part: str) -> None:
    trained, held = set(getattr(TRAIN, part)) - {""}, set(getattr(HELDOUT, part))
    assert trained
    assert held
    assert not trained & held


def test_no_trained_row_holds_a_heldout_name_or_product() -> None:
    held = {*HELDOUT.first, *HELDOUT.last, *HELDOUT.kinds, *HELDOUT.things}
    for row in draw_orders(3000):
        answer = json.loads(row.answer)
        words = {*answer["customer"].split(), *(w for item in answer["items"] for w in item["name"].split())}
        assert not words & held


def test_same_seed_same_rows_and_no_row_twice() -> None:
    rows = draw_orders(200, seed=3)
    assert rows == draw_orders(200, seed=3)
    assert rows != draw_orders(200, seed=4)
    assert len({row.prompt for row in rows}) == 200


@given(st.integers(0, 1000), st.sampled_from(["train", "heldout"]))
def test_everything_in_the_answer_stands_in_the_email(seed: int, split: str) -> None:
    (row,) = draw_orders(1, split="train" if split == "train" else "heldout", seed=seed)
    answer = json.loads(row.answer)
    assert row.prompt.startswith(INSTRUCTION)
    assert answer["customer"] in row.prompt
    assert answer["date"] in row.prompt
    for item in answer["items"]:
        assert item["name"] in row.prompt
        assert str(item["qty"]) in row.prompt
    assert is_exact_match(row.answer, row.answer)


@pytest.mark.parametrize(
    "answer",
    [
        ROW.answer,
        "  " + ROW.answer + "\n",
        json.dumps(json.loads(ROW.answer), indent=2),
        '{"date":"14 March","customer":"Ada Holm","items":[{"qty":3,"name":"oak stool"}]}',
    ],
)
def test_spacing_and_key_order_are_free(answer: str) -> None:
    assert is_exact_match(answer, ROW.answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure! " + ROW.answer,
        ROW.answer[:-1],
        ROW.answer.replace("3", "4"),
        ROW.answer.replace("3", "3.0"),
        ROW.answer.replace("3", '"3"'),
        ROW.answer.replace('"date"', '"day"'),
        ROW.answer.replace("{", '{"date": "1 May", ', 1),
        f"[{ROW.answer}]",
        "[" * 100_000,
    ],
)
def test_anything_else_is_wrong(answer: str) -> None:
    assert not is_exact_match(answer, ROW.answer)
