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

DIGESTS = {"wide": "a" * 64, "narrow": "b" * 64}
RANKS = {"wide": 8, "narrow": 2}


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
        ("1*even", 400, "'even' is a profile; a recipe combines adapters only."),
        ("17*wide", 400, "16"),
        ({"adapters": []}, 400, "adapters"),
        (3, 400, "'fusion' must be a profile, a recipe or an object with 'adapters', got 3."),
    ],
)
def test_what_cannot_be_resolved_says_why(names: Names, value: Any, status: int, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        names.resolve_field(value)
    assert caught.value.status == status
    assert words in caught.value.message
    assert caught.value.param == "fusion"
