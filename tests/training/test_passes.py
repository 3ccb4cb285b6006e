"""Forward passes: every row once, within the limit, packed or padded."""

from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, strategies as st

from training.rows.encoding import Row
from training.rows.passes import IGNORE, is_opening_token, make_passes, row_of_token, shuffle_epoch


def make_row(length: int, wanted: int = 1, number: int = 0) -> Row:
    mask = np.zeros(length, bool)
    mask[length - wanted :] = True
    return Row(np.arange(length, dtype=np.int32), mask, f"row:{number}")


@given(st.lists(st.integers(2, 60), min_size=1, max_size=30), st.integers(40, 100), st.integers(1, 4), st.booleans())
def test_passes_hold_every_row_once_within_the_limit(
    lengths: list[int], limit: int, world_size: int, pack: bool
) -> None:
    rows = [make_row(length, min(length - 1, 3), number) for number, length in enumerate(lengths)]
    passes = make_passes(rows, limit, world_size, pack=pack, pad=9, share_prefix=False)
    assert Counter(row.where for batch in passes for row in batch.rows) == Counter(row.where for row in rows)
    assert sum(batch.target_count for batch in passes) == sum(int(row.is_target.sum()) for row in rows)
    assert all(batch.ids.numel() <= limit or len(batch.rows) == 1 for batch in passes)
    if pack:
        assert len(passes) % world_size == 0 or len(passes) == len(rows)
        assert sum(batch.ids.numel() for batch in passes) == sum(lengths)
    for batch in passes:
        starts = np.cumsum([0, *batch.lengths[:-1]]).tolist()
        places = [(0, start) for start in starts] if pack else [(line, 0) for line in range(len(batch.rows))]
        for row, (line, start) in zip(batch.rows, places, strict=True):
            stop = start + len(row.ids)
            assert (batch.ids[line, start:stop].numpy() == row.ids).all()
            assert batch.positions[line, start:stop].tolist() == list(range(len(row.ids)))
            assert (batch.labels[line, start:stop] != IGNORE).tolist() == row.is_target.tolist()


def test_a_row_s_first_token_is_not_learned_from_the_row_before() -> None:
    row = replace(make_row(5), is_target=np.ones(5, bool))
    (batch,) = make_passes([row, row], 100, pack=True, pad=0)
    assert (batch.target_count, batch.shared) == (8, 0)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=2, max_size=6), st.integers(0, 12))
def test_rows_share_their_beginning_and_lose_nothing(parts: list[tuple[int, int]], common: int) -> None:
    rows = []
    for i, (asked, answered) in enumerate(parts):
        ids = [7] * common + [100 + i] * asked + [200 + i] * answered
        wanted = [False] * (common + asked) + [True] * answered
        rows.append(Row(np.array(ids, np.int32), np.array(wanted, bool), f"r:{i}"))
    (batch,) = make_passes(rows, 10**6, pack=True, pad=0)
    assert batch.shared == common
    assert batch.target_count == sum(answered for _, answered in parts)
    start = batch.shared
    for row, length in zip(rows, batch.lengths, strict=True):
        own = slice(start, start + length)
        seen, positions, labels = (
            torch.cat([line[0, : batch.shared], line[0, own]]) for line in (batch.ids, batch.positions, batch.labels)
        )
        assert seen.tolist() == row.ids.tolist()
        assert positions.tolist() == list(range(len(seen)))
        assert (labels != IGNORE).tolist() == row.is_target.tolist()
        start += length


@given(st.lists(st.integers(3, 20), min_size=1, max_size=8), st.booleans())
def test_every_loss_belongs_to_the_row_that_its_token_is_of(lengths: list[int], pack: bool) -> None:
    rows = [make_row(length, 1 + number % (length - 1), number) for number, length in enumerate(lengths)]
    (batch,) = make_passes(rows, 10**6, pack=pack, pad=0, share_prefix=False)
    counts = Counter(batch.rows[i].where for i in row_of_token(batch).tolist())
    assert counts == Counter({row.where: int(row.is_target.sum()) for row in rows})


def test_the_first_tokens_of_every_answer_are_its_opening() -> None:
    x = IGNORE
    labels = torch.tensor([[x, x, 5, 5, 5, x, 6, x, 7, 7], [x, 8, 8, 8, 8, 8, x, x, x, x]])
    opening = [True, True, False, True, True, True, True, True, False, False, False]
    assert is_opening_token(labels, 2).tolist() == opening


def test_an_epoch_holds_every_row_once_in_its_own_order() -> None:
    first, second = shuffle_epoch(37, 4, 0, 0), shuffle_epoch(37, 4, 0, 1)
    for epoch in (first, second):
        assert Counter(number for step in epoch for number in step) == Counter(range(37))
        assert [len(step) for step in epoch] == [4] * 9 + [1]
    assert first != second
    assert first == shuffle_epoch(37, 4, 0, 0)
    assert first != shuffle_epoch(37, 4, 1, 0)
