"""From values to probabilities, and how well values tell two kinds apart."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from training.errors import ConfigError
from training.gates.calibration import (
    Flags,
    Floats,
    area,
    calibrate,
    estimate,
    false_alarms,
    find_threshold,
    move_offset,
)


def draw(count: int, scale: float, offset: float) -> tuple[Floats, Flags]:
    """Values whose danger has the probability 1 / (1 + exp(-(scale·value + offset)))."""
    rng = np.random.default_rng(0)
    values = rng.normal(1.0, 3.0, count)
    return values, rng.random(count) < 1 / (1 + np.exp(-(scale * values + offset)))


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.3, -1.0), (5.0, 2.0)])
def test_calibration_finds_the_scale_and_offset_of_the_data(scale: float, offset: float) -> None:
    fitted = calibrate(*draw(100_000, scale, offset))
    assert fitted == pytest.approx((scale, offset), rel=0.05, abs=0.05)


def test_calibration_does_not_depend_on_the_values_unit() -> None:
    values, dangerous = draw(2000, 1.0, 0.5)
    scale, offset = calibrate(values, dangerous)
    assert calibrate(1000 * values + 7, dangerous) == pytest.approx((scale / 1000, offset - 7 * scale / 1000))


def test_kinds_that_are_apart_have_a_finite_scale() -> None:
    scale, offset = calibrate(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([False, False, True, True]))
    assert 0 < scale < 10
    assert offset == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("values", [[2.0, 1.0, -1.0, -2.0], [1.0, 1.0, 1.0, 1.0]])
def test_a_value_that_tells_nothing_is_refused(values: list[float]) -> None:
    with pytest.raises(ConfigError, match="learned nothing"):
        calibrate(np.array(values), np.array([False, False, True, True]))


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2).filter(lambda x: len({k for _, k in x}) == 2))
def test_the_area_is_the_share_of_pairs_in_order(pairs: list[tuple[int, bool]]) -> None:
    values, dangerous = np.array([float(v) for v, _ in pairs]), np.array([k for _, k in pairs])
    outcomes = [(p > n) + (p == n) / 2 for p in values[dangerous] for n in values[~dangerous]]
    assert area(values, dangerous) == pytest.approx(sum(outcomes) / len(outcomes))


def test_false_alarms_are_the_harmless_at_the_threshold_of_the_recall() -> None:
    values = np.array([*np.arange(1.0, 21.0), 0.0, 1.5, 2.5, 30.0])
    dangerous = np.array([True] * 20 + [False] * 4)
    assert find_threshold(values, dangerous) == 2.0  # 19 of 20 reach it
    assert false_alarms(values, dangerous) == 0.5
    assert find_threshold(values, dangerous, recall=1e-6) == 20.0


def test_an_interval_holds_its_value_and_shrinks_with_more_prompts() -> None:
    few, many = (estimate(area, *draw(count, 1.0, 0.0)) for count in (50, 2000))
    for one in (few, many):
        assert one.low <= one.value <= one.high
    assert many.high - many.low < few.high - few.low
    assert estimate(area, *draw(50, 1.0, 0.0)) == few


def test_a_moved_offset_has_the_recall_at_one_half() -> None:
    values, dangerous = draw(500, 2.0, 1.0)
    offset = move_offset(2.0, values, dangerous, 0.9)
    assert np.mean(2.0 * values[dangerous] + offset >= -1e-9) == pytest.approx(0.9, abs=0.01)
