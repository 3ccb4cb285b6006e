"""Placement: which stack or build serves a fusion, as a function of values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, strategies as st

from adapters import fusion_digest, parse
from service.errors import ApiError
from service.placement import Limits, place, stack_key
from service.resolve import Fusion
from tests.adapters import samples  # noqa: F401 - its profile makes hypothesis reproducible

RANKS = {"a": 4, "b": 2, "c": 3, "d": 20}
LIMITS = Limits(mixing=True, max_rank=16)
SMALL = ["a", "b", "c"]


@dataclass
class Occupant:
    """A stack or build in the engine."""

    key: str
    rank: int
    widths: Mapping[str, int]
    leases: int = 0


def make_stack(members: Sequence[str], leases: int = 0) -> Occupant:
    widths = {name: RANKS[name] for name in sorted(members)}
    return Occupant(stack_key(members), sum(widths.values()), widths, leases)


def fusion(text: str) -> Fusion:
    """Names serve as digests, too."""
    recipe = parse(text)
    parents = {name: name for name in recipe.adapters}
    ranks = {name: RANKS[name] for name in recipe.adapters}
    return Fusion(recipe, parents, fusion_digest(recipe, base="base", parents=parents), "(inline)", ranks=ranks)


def make_sum(members: Sequence[str]) -> Fusion:
    return fusion(" + ".join(f"1*{name}" for name in members))


members = st.lists(st.sampled_from(SMALL), min_size=1, unique=True)
stacks = st.lists(st.builds(make_stack, members, st.integers(0, 3)), max_size=4, unique_by=lambda stack: stack.key)


@pytest.mark.parametrize(
    ("text", "mixing", "reason"),
    [
        ("1*a + 1*d", True, "the adapters' ranks add up to 24, over FUSION_MAX_LORA_RANK=16"),
        ("svd(1*a + 1*b, rank=2)", True, "'svd' is not a weighted sum of its adapters in each module"),
        ("1*a + 1*b", False, "mixing is off on this server"),
    ],
)
def test_what_is_built_says_why(text: str, mixing: bool, reason: str) -> None:
    placement = place(fusion(text), [], [], Limits(mixing, 16))
    assert (placement.kind, placement.reason) == ("build", reason)


@pytest.mark.parametrize(
    ("text", "limits", "reason"),
    [
        ("1*a + ramp(0.2..0.6)*b", {}, None),
        ("{*.mlp.*: 1, *: 0}*a", {}, None),
        ("slerp(1*a + 1*b, from=a, t=0.3)", {}, None),
        ("answer(1*a)", {}, None),
        ("1*a + ramp(0.2..0.6)*b", {"tables": False}, "weights by module are off on this server: why"),
        ("[1, 2, 3, 4]*a", {"tables": False}, "weights by module are off on this server: why"),
        ("answer(1*a)", {"tables": False}, None),
        ("ramp(0.2..0.6)*b", {"phases": False}, None),
    ],
)
def test_functions_are_mixed_where_the_engine_can(text: str, limits: dict[str, bool], reason: str | None) -> None:
    placement = place(fusion(text), [], [], Limits(True, 16, **limits, reason="why"))
    assert (placement.kind, placement.reason) == ("build" if reason else "stack", reason)


@pytest.mark.parametrize(
    ("text", "limits", "reason"),
    [
        ("fade(1..0, 4)*a", Limits(True, 16, phases=False, reason="why"), "by position are off on this server: why"),
        ("answer(ramp(0..1)*a)", Limits(True, 16, tables=False, reason="why"), "by module are off on this server: why"),
        ("answer(1*a)", Limits(False, 16), "mixing is off"),
        ("answer(1*a + 1*d)", LIMITS, "the adapters' ranks add up to 24"),
    ],
)
def test_weights_by_position_that_cannot_be_mixed_are_refused(text: str, limits: Limits, reason: str) -> None:
    with pytest.raises(
        ApiError, match=f"Weights that change with position or prompt cannot be built, and .*{reason}"
    ) as error:
        place(fusion(text), [], [], limits)
    assert error.value.status == 400


@given(members, stacks)
def test_a_stack_holds_all_adapters_of_its_fusion(names: list[str], residents: list[Occupant]) -> None:
    placement = place(make_sum(names), residents, [], LIMITS)
    assert (placement.kind, placement.reason) == ("stack", None)
    assert set(names) <= set(placement.digests)
    assert placement.key == stack_key(placement.digests)


@given(members, st.randoms())
def test_neither_order_nor_weights_change_the_place(names: list[str], draw: Random) -> None:
    text = " + ".join(f"{draw.uniform(-1, 1):.3f}*{name}" for name in draw.sample(names, len(names)))
    assert place(fusion(text), [], [], LIMITS) == place(make_sum(names), [], [], LIMITS)


@given(members, stacks)
def test_of_the_resident_stacks_the_busiest_and_then_the_smallest_serves(
    names: list[str], residents: list[Occupant]
) -> None:
    holding = [resident for resident in residents if set(names) <= set(resident.widths)]
    placement = place(make_sum(names), residents, [], LIMITS)
    if not holding:
        assert placement.digests == tuple(sorted(names))
        return
    chosen = next(resident for resident in holding if resident.key == placement.key)
    assert (-chosen.leases, chosen.rank) == min((-resident.leases, resident.rank) for resident in holding)


@given(members, stacks)
def test_a_declared_group_comes_before_residents(names: list[str], residents: list[Occupant]) -> None:
    group = {name: RANKS[name] for name in SMALL}
    assert place(make_sum(names), residents, [group], LIMITS).key == stack_key(SMALL)


def test_a_group_over_the_rank_limit_serves_nothing() -> None:
    group = {name: RANKS[name] for name in ("a", "d")}
    assert place(make_sum(["a"]), [], [group], LIMITS).digests == ("a",)


def test_a_build_is_one_per_fusion_and_rank_limit() -> None:
    texts = ("svd(1*a + 1*b, rank=2)", "svd(1*b + 1*a, rank=2)", "svd(1*a + 1*b, rank=3)")
    one, same, other = (place(fusion(text), [], [], LIMITS).key for text in texts)
    assert one == same != other
    assert place(fusion(texts[0]), [], [], Limits(mixing=True, max_rank=8)).key != one


def test_two_names_of_one_adapter_count_once() -> None:
    twins = Fusion(parse("1*a + 1*b"), {"a": "x", "b": "x"}, "0" * 64, "(inline)", ranks={"x": 10})
    assert place(twins, [], [], LIMITS).digests == ("x",)
