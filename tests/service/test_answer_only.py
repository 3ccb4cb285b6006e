"""Adapters that act on the answer alone: which recipes may use them, and what registering them says."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters import fusion_digest, parse
from service.base_model import read_fitting
from service.errors import ApiError
from service.layers import BaseLayers
from service.records import AdapterRecord, read_adapter
from service.registry import Registry, to_json
from service.resolve import Names
from service.routes.adapters import adapter_card
from service.settings import Settings
from tests.adapters import samples
from tests.service.conftest import adapter_info, fill

CREATED = "2026-01-01T00:00:00+00:00"
RECORDS = {
    "plain": AdapterRecord("plain", "a" * 64, adapter_info(), CREATED),
    "ours": AdapterRecord("ours", "b" * 64, adapter_info(answer_only=True), CREATED),
    "theirs": AdapterRecord("theirs", "c" * 64, adapter_info(answer_only=True), CREATED),
}
TERMS = [{"name": "ours", "weight": 0.6}, {"name": "plain", "weight": 0.4}]


@pytest.fixture
def names(tmp_path: Path) -> Iterator[Names]:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    fill(registry, *RECORDS.values())
    yield Names("base", registry, max_weight=16.0, max_norm=math.inf)
    registry.close()


@pytest.mark.parametrize(
    ("value", "way"),
    [
        ("0.6*ours + 0.4*plain", "or 'steps(0: 0.6)*ours' (at position 4); or register it"),
        ({"adapters": TERMS}, "'answer(0.6*ours + 0.4*plain)'"),
        ("0.6*ours + 0.4*theirs", "'answer(0.6*ours + 0.4*theirs)'"),
        ("1 * ours", "'answer(ours)' or 'steps(0: 1)*ours'"),
        ("1*plain + steps(prompt: 0.1, 0: 1)*ours", "expected 'steps(0: …)*ours'"),
        ("ties(1*ours + 1*plain, density=0.5)", "expected a weighted sum inside answer(…)"),
    ],
)
def test_a_weight_on_the_prompt_is_a_400_with_the_way_out(names: Names, value: Any, way: str) -> None:
    with pytest.raises(ApiError) as caught:
        names.resolve_field(value)
    assert (caught.value.status, caught.value.param) == (400, "fusion")
    assert caught.value.message.startswith("'ours' is an answer-only adapter, but '")
    assert way in caught.value.message
    assert "register it with 'answer_only': false" in caught.value.message


@pytest.mark.parametrize(
    "text", ["answer(0.6*ours + 0.4*plain)", "0.4*plain + steps(0: 0.6)*ours", "1*plain + 0*ours", "1*plain"]
)
def test_a_recipe_that_leaves_the_prompt_alone_is_bound(names: Names, text: str) -> None:
    fusion = names.look_up(text)
    assert fusion is not None
    assert fusion.recipe == parse(text)
    assert "plain" in fusion.parents


def test_its_name_stands_for_it_where_it_acts(names: Names) -> None:
    fusion, plain = names.look_up("ours"), names.look_up("plain")
    assert fusion is not None
    assert plain is not None
    assert (fusion.recipe.format(), plain.recipe.format()) == ("answer(ours)", "plain")
    assert fusion.digest == fusion_digest(parse("answer(ours)"), base="base", parents={"ours": "b" * 64})


@pytest.mark.parametrize("says", [False, True])
@pytest.mark.parametrize("key", [None, False, True])
def test_the_key_of_a_registration_goes_before_the_file(says: bool, key: bool | None) -> None:
    adapter = replace(samples.adapter(7, 2), answer_only=says)
    settings = Settings(base_name=samples.BASE)
    read, _ = read_fitting(lambda: adapter, BaseLayers(samples.SHAPES), settings, None, key)
    assert read.answer_only == (says if key is None else key)
    assert (read.digest == samples.adapter(7, 2).digest) != read.answer_only


def test_records_and_answers_say_so() -> None:
    cards = {name: adapter_card(record, {}).model_dump(exclude_unset=True) for name, record in RECORDS.items()}
    assert cards["ours"]["answer_only"] is True
    assert "answer_only" not in cards["plain"]
    for record in RECORDS.values():
        row = read_adapter(record.name, record.digest, to_json(record.info), record.created)
        assert (row, row.answer_only) == (record, record.name != "plain")
