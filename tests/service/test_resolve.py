"""Names and what they resolve to, over a registry of its own."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters import parse
from service.errors import ApiError
from service.records import AdapterRecord, ProfileVersion
from service.registry import Registry
from service.resolve import Fusion, Names
from tests.service.conftest import adapter_info, fill

DIGESTS = {"wide": "a" * 64, "narrow": "b" * 64, "org/adapter@v1": "c" * 64, "7b-sql": "d" * 64}
RANKS = {"wide": 8, "narrow": 2, "org/adapter@v1": 4, "7b-sql": 1}


@pytest.fixture
def names(tmp_path: Path) -> Iterator[Names]:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    for name, digest in DIGESTS.items():
        fill(registry, AdapterRecord(name, digest, adapter_info(rank=RANKS[name]), ""))
    names = Names("base", registry, max_weight=16.0, max_norm=math.inf)
    for version, text in enumerate(("1*wide", "0.5*wide + 0.5*narrow"), 1):
        fusion = names.resolve_recipe(parse(text))
        parents = dict(fusion.parents)
        fill(registry, ProfileVersion("even", version, text, parents, fusion.digest, {"max_tokens": 2}))
    yield names
    registry.close()


def resolve(names: Names, text: Any) -> Fusion:
    fusion = names.resolve_field(text)
    assert fusion is not None
    return fusion


def test_every_name_has_one_owner(names: Names) -> None:
    owners = {name: names.owner(name) for name in ("base", "even", "wide", "free")}
    assert owners == {"base": "the base model", "even": "a profile", "wide": "an adapter", "free": None}


def test_the_base_is_no_fusion(names: Names) -> None:
    assert names.look_up("base") is None


def test_all_spellings_of_a_recipe_have_one_digest_and_the_ranks_of_its_adapters(names: Names) -> None:
    as_json = {"adapters": [{"name": "narrow", "weight": 0.5}, {"name": "wide", "weight": 0.5}]}
    spellings = ("even", "even@2", "0.5*wide + 0.5*narrow", "5e-1*narrow+.5*wide", as_json)
    fusions = [resolve(names, spelling) for spelling in spellings]
    assert len({fusion.digest for fusion in fusions}) == 1
    assert {fusion.rank for fusion in fusions} == {10}
    assert {tuple(sorted(fusion.ranks.items())) for fusion in fusions} == {(("a" * 64, 8), ("b" * 64, 2))}


def test_a_profile_carries_its_defaults_and_its_label(names: Names) -> None:
    profile, inline = resolve(names, "even@1"), resolve(names, "1*wide")
    assert (profile.label, profile.defaults) == ("even", {"max_tokens": 2})
    assert (inline.label, inline.defaults) == ("(inline)", {})
    assert profile.digest == inline.digest


@pytest.mark.parametrize(
    ("value", "status", "words"),
    [
        ("wyde", 404, "There is no model 'wyde': did you mean 'wide'?"),
        ("1*wyde", 404, "There is no adapter 'wyde': did you mean 'wide'?"),
        ("1*xyz + 1*wide", 404, "There is no adapter 'xyz': GET /v1/models lists all names."),
        ("evne@1", 404, "There is no profile 'evne': did you mean 'even'?"),
        ("even@3", 404, "Profile 'even' has no version '3'; it has 1, 2."),
        ("1*even", 400, "'even' (at position 2) is a profile; a recipe combines adapters only."),
        ("gate(1*wide, by=even, wide in 0..1)", 400, "'even' (at position 16) is a profile"),
        ("17*wide", 400, "16"),
        ({"adapters": []}, 400, "adapters"),
        ("", 400, "'fusion' is empty: expected 'base', an adapter, a profile or a recipe"),  # C8
        (" ", 400, "'fusion' is empty"),
        ("openai/even", 404, "There is no model 'openai/even': did you mean 'even'?"),  # C7
        ("even:latest", 404, "There is no model 'even:latest': did you mean 'even'?"),  # C7
        ("Acme/BASE", 404, "There is no model 'Acme/BASE': did you mean 'base'?"),  # C7
        ("even@main", 404, "Profile 'even' has no version 'main'; it has 1, 2."),
        ("Org/Adapter", 404, "did you mean 'org/adapter@v1'?"),
        ("org/adapter@v2", 404, "did you mean 'org/adapter@v1'?"),
        ("org/adapter@2", 404, "There is no model 'org/adapter@2': did you mean 'org/adapter@v1'?"),
        ("7b-sqll", 404, "There is no model '7b-sqll': did you mean '7b-sql'?"),
        ("@cf/meta/llama-2-7b", 404, "There is no model '@cf/meta/llama-2-7b': GET /v1/models lists all names."),
        ("GPT 4", 404, "There is no model 'GPT 4'"),
        ("数学", 404, "There is no model"),
        ("3", 404, "There is no model '3'"),
        ("0.5 wide", 400, "expected '*' between the weight"),
        ("-wide", 400, "digits after the sign"),
        ("0.5*org/adapter@v1", 400, "are put in backquotes"),
        ("0.5*`openai/wide`", 404, "There is no adapter 'openai/wide': did you mean 'wide'?"),
        (3, 400, "'fusion' must be a profile, a recipe or an object with 'adapters', got 3."),
    ],
)
def test_what_cannot_be_resolved_says_why(names: Names, value: Any, status: int, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        names.resolve_field(value)
    assert caught.value.status == status
    assert words in caught.value.message
    assert caught.value.param == "fusion"


@pytest.mark.parametrize("name", ["org/adapter@v1", "7b-sql"])  # B3
def test_a_name_that_a_recipe_quotes_stands_for_itself_alone(names: Names, name: str) -> None:
    quoted = {"adapters": [{"name": name}]}
    spellings = (name, f"`{name}`", f'1*"{name}"', f"sum(`{name}`)", quoted)
    fusions = [resolve(names, spelling) for spelling in spellings]
    assert {fusion.recipe.format() for fusion in fusions} == {f"`{name}`"}
    assert {fusion.digest for fusion in fusions} == {fusions[0].digest}
    assert resolve(names, f"0.5*`{name}` + 0.5*wide").rank == RANKS[name] + 8


def test_no_adapter_takes_the_form_of_a_version_of_a_profile(names: Names) -> None:
    assert names.owner("even@7") == "the form of a version of the profile 'even'"
    assert names.owner("even@x") is not None
    assert names.owner("wide@7") is None


@pytest.mark.parametrize("plain", ["wide", "even", "even@1", "org/adapter@v1", "0.5*wide + 0.5*narrow"])
def test_a_name_may_follow_the_base_s(names: Names, plain: str) -> None:
    assert resolve(names, f"base:{plain}") == resolve(names, plain)
    with pytest.raises(ApiError) as caught:
        names.look_up("base:nobody")
    assert caught.value.status == 404


def test_an_adapter_that_is_called_so_comes_first(names: Names) -> None:
    fill(names.registry, AdapterRecord("base:wide", "e" * 64, adapter_info(rank=1), ""))
    assert set(resolve(names, "base:wide").ranks) == {"e" * 64}
