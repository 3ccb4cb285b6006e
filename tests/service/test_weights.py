"""Weights as functions: how they travel in a name, which positions a phase acts on, what tells blocks apart."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from adapters import PROMPT
from service.engine.names import mix_name
from service.engine.weights import (
    FUNCTION,
    MAX_BYTES,
    Mix,
    MixReader,
    Phase,
    Weights,
    function_name,
    make_table,
    read_mix,
)

WIDTHS = (2, 3)
MODULES = 4


def table(seed: int, columns: int = 2) -> Any:
    return np.random.default_rng(seed).normal(size=(MODULES, columns)).astype(np.float32)


def read(*phases: Phase, stack: str = "stack") -> Mix:
    mix = read_mix(function_name(stack, Weights(WIDTHS, phases)))
    assert mix is not None
    return mix


def test_a_plain_mix_keeps_its_name() -> None:
    name = function_name("stack", Weights(WIDTHS, (Phase(PROMPT, [0.5, -1.0]),)))
    assert name == mix_name("stack", [(2, 0.5), (3, -1.0)]) == "~mix/stack/2:0.5,3:-1.0"


@pytest.mark.parametrize("weights", [[0.1, 1 / 3], table(0), table(1, 5), [[1e-30, -0.0, 16, 1, 2]]])
def test_weights_survive_the_name_to_float32(weights: Any) -> None:
    values = Phase(PROMPT, weights).weights
    mix = read(Phase(PROMPT, [0.25, 0.75]), Phase(0, values))
    assert mix.stack == "stack"
    assert mix.starts == (PROMPT, 0)
    expected = values if values.shape[1] == 5 else np.repeat(values, WIDTHS, axis=1)
    assert np.array_equal(mix.tables[1].expand(), expected)


@pytest.mark.parametrize("name", ["wide", "~build/key", "~proof/x", ""])
def test_other_names_are_no_mixes(name: str) -> None:
    assert read_mix(name) is None


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ([], "0 phases: expected 1 to 8"),
        ([(start, [1, 1]) for start in range(-1, 8)], "9 phases"),
        ([(0, [1, 1])], r"start at \[0\]: expected -1 \(the prompt\)"),
        ([(-1, [1, 1]), (4, [1, 1]), (4, [1, 1])], "ascending"),
        ([(-1, [1, 1]), (-2, [1, 1])], "ascending"),
        ([(-1, [1, 1, 1])], r"shapes \[\(1, 3\)\]: expected 1 or as many rows as modules"),
        ([(-1, table(0)), (0, table(0)[:2])], "as many rows as modules"),
        ([(-1, np.zeros((MAX_BYTES // 8 + 1, 2)))], f"the limit is {MAX_BYTES}"),
    ],
)
def test_phases_that_do_not_fit_are_refused(phases: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Weights(WIDTHS, tuple(Phase(start, weights) for start, weights in phases))


@pytest.mark.parametrize("weights", [[float("nan"), 1], [1e39, 1], [], [[[1.0]]]])
def test_weights_that_are_no_numbers_are_refused(weights: Any) -> None:
    with pytest.raises(ValueError, match="weight"):
        Phase(PROMPT, weights)


def acting(mix: Mix, prompt: int, position: int) -> str:
    """The table at an input position, by the definition: answer token n is computed by position prompt - 1 + n."""
    token = position - (prompt - 1)
    return [t for s, t in zip(mix.starts, mix.tables, strict=True) if s == PROMPT or s <= token][-1].digest


STARTS = st.lists(st.integers(0, 30), max_size=7, unique=True).map(sorted)


@given(STARTS, st.integers(1, 20), st.integers(0, 60), st.integers(0, 40))
def test_every_position_has_the_phase_of_the_token_it_computes(
    starts: list[int], prompt: int, begin: int, count: int
) -> None:
    mix = read(*(Phase(start, [start, 1]) for start in [PROMPT, *starts]))
    digests = [table.digest for table, n in mix.spans(begin, begin + count, prompt) for _ in range(n)]
    assert digests == [acting(mix, prompt, position) for position in range(begin, begin + count)]


def test_tables_that_act_equally_are_one() -> None:
    uniform = make_table(np.full((1, 2), 0.5, np.float32), WIDTHS)
    for values in (np.full((1, 5), 0.5), np.full((MODULES, 2), 0.5), np.full((MODULES, 5), 0.5)):
        same = make_table(values.astype(np.float32), WIDTHS)
        assert (same.digest, same.is_uniform) == (uniform.digest, True)
    assert (
        make_table(np.array([[0.5, -0.0]], np.float32), WIDTHS).digest
        == make_table(np.array([[0.5, 0.0]], np.float32), WIDTHS).digest
    )
    assert make_table(table(1), WIDTHS).digest != make_table(table(2), WIDTHS).digest
    assert read(Phase(PROMPT, table(1)), Phase(0, [0, 1])).tables[0] is read(Phase(PROMPT, table(1))).tables[0]


def test_blocks_are_told_apart_by_what_acts_at_their_positions_alone() -> None:
    one, other = [0.5, 0.25], [1.0, 0.0]
    plain, switched = read(Phase(PROMPT, one)), read(Phase(PROMPT, one), Phase(0, other))
    again, constant = read(Phase(PROMPT, one), Phase(0, table(1))), read(Phase(PROMPT, one), Phase(3, one))
    assert plain.key(0, 16, 40) == switched.key(0, 16, 40) == again.key(16, 32, 40) == constant.key(32, 48, 40)
    assert plain.key(32, 48, 40) != switched.key(32, 48, 40) != again.key(32, 48, 40)
    assert switched.key(32, 48, 40) == switched.key(48, 64, 56)  # the border is at one place of the block
    assert switched.key(32, 48, 40) != switched.key(32, 48, 41)
    assert read(Phase(PROMPT, one), stack="other").key(0, 16, 40) != plain.key(0, 16, 40)


def test_a_block_without_weights_is_the_bases() -> None:
    answer = read(Phase(PROMPT, [0, -0.0]), Phase(0, [1, 0]))
    assert answer.key(0, 16, 17) is None
    assert answer.key(0, 16, 16) is not None  # its last position computes the answer's first token
    assert read(Phase(PROMPT, [0.0, 0.0])).key(0, 16, 5) is None


def test_a_reader_keeps_what_fits_and_reads_the_rest_again() -> None:
    reader = MixReader(budget=3000)
    names = [function_name("s", Weights(WIDTHS, (Phase(PROMPT, table(seed)),))) for seed in range(20)]
    assert all(name.startswith(FUNCTION) for name in names)
    first = reader.read(names[0])
    assert first is not None
    assert reader.read(names[0]) is first
    for name in names:
        reader.read(name)
    assert len(reader._mixes) < 6  # noqa: SLF001 - its bound is the property
    again = reader.read(names[0])
    assert again is not None
    assert again is not first
    assert again.tables[0] is first.tables[0], "tables in use are shared"
