"""How points become waves, and what a folder keeps of them."""

import json
from dataclasses import replace
from pathlib import Path

from eval_clients.answers import Answer, Answers
from eval_clients.endpoint import Plan
from eval_clients.sweeps.points import Point
from eval_clients.sweeps.sweep import drop_repeats, find_unfinished, save_points, split_waves

MIXED = Plan("d", True, "r", 0.0)
POINTS = [Point(name, "sweep", "s", {"l": float(n)}) for n, name in enumerate("abcd")]


def test_mixed_points_share_one_wave_and_built_ones_have_their_own() -> None:
    plans = {"a": MIXED, "b": replace(MIXED, mixed=False), "c": MIXED, "d": replace(MIXED, mixed=False)}
    assert [[point.model for point in wave] for wave in split_waves(POINTS, plans)] == [["a", "c"], ["b"], ["d"]]
    assert split_waves(POINTS, {}) == [POINTS]
    assert split_waves([], {}) == []


def test_a_point_is_finished_when_all_its_answers_are_there() -> None:
    answers = [Answer("a", "t", str(n), 1, "safe", "", "choose", "p", "a", {}) for n in range(3)]
    more = [replace(answer, model="b") for answer in answers[:2]]
    assert [point.model for point in find_unfinished(POINTS, Answers([*answers, *more]), 3)] == ["b", "c", "d"]


def test_points_of_earlier_rounds_stay_and_are_updated(tmp_path: Path) -> None:
    save_points(tmp_path, POINTS[:2])
    changed = replace(POINTS[1], kind="search")
    save_points(tmp_path, [changed, POINTS[2]])
    points = [Point(**row) for row in json.loads((tmp_path / "points.json").read_text())]
    assert points == [POINTS[0], changed, POINTS[2]]


def test_the_first_point_of_a_model_counts() -> None:
    assert drop_repeats([POINTS[0], replace(POINTS[0], kind="control"), POINTS[1]]) == POINTS[:2]
