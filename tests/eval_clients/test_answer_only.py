"""Sweeps of adapters that act on the answer alone."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from inspect_ai import Task

from eval_clients.endpoint import Endpoint
from eval_clients.running import RunOptions, prepare_folder
from eval_clients.sweeps.answer_only import NOTE, answer_points
from eval_clients.sweeps.choice import Limit
from eval_clients.sweeps.points import Point, expand
from eval_clients.sweeps.search import FORMS, list_forms, make_point
from eval_clients.sweeps.study import Study, run_study
from eval_clients.tasks.benchmarks import build_task
from tests.eval_clients.faulty import Faulty, endpoint

ADAPTERS, ANSWER_ONLY = ("a", "b", "plain"), ("a", "b")


def models(points: Sequence[Point], answer_only: Sequence[str] = ANSWER_ONLY) -> list[str]:
    return [point.model for point in answer_points(points, ADAPTERS, answer_only)]


def test_points_of_such_adapters_alone_are_put_inside_answer() -> None:
    points = expand(["{1-l}*a + {l}*b", "answer(1*a)", "gate(1*a + {l}*b, by=g, b in 0..1)"], ["l=0.4"])
    points += [Point("base", "control", "base"), Point("balanced@2", "sweep", "s")]
    assert models(points) == [
        "answer(0.6*a + 0.4*b)",
        "answer(1*a)",
        "gate(answer(1*a + 0.4*b), by=g, b in 0..1)",
        "base",
        "balanced@2",
    ]
    changed = answer_points(points, ADAPTERS, ANSWER_ONLY)[0]
    assert (changed.series, changed.values) == ("answer({1-l}*a + {l}*b)", {"l": 0.4})


def test_one_plain_adapter_leaves_all_points_as_they_are() -> None:
    points = [*expand(["{l}*a + 1*plain", "{l}*b"], ["l=0.4"]), Point("base", "control", "base")]
    assert answer_points(points, ADAPTERS, ANSWER_ONLY) is points
    assert answer_points(points, ADAPTERS, ()) is points


def test_what_cannot_be_inside_answer_stays_for_the_service_to_refuse() -> None:
    texts = ["ties(1*a + 1*b, density=0.5)", "steps(prompt: 0.5, 0: 1)*a"]
    assert models([Point(text, "sweep", "s") for text in texts]) == texts


class Answering(Endpoint):
    """Lists adapters, all of them answer-only, as the service does; takes no others."""

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        if (method, path) == ("GET", "/adapters"):
            data = [{"name": name, "answer_only": True} for name in ANSWER_ONLY]
            return httpx.Response(200, json={"data": data, "has_more": False})
        return super().request(method, path, **options)


def test_the_sweep_does_so_and_the_report_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    prompts = [{"prompt": f"Pull the weeds in garden {n}", "kind": "harmless"} for n in range(4)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in prompts))

    def build_tasks() -> Sequence[Task]:
        return [build_task("harmless", str(rows))]

    prepare_folder(tmp_path / "study", False)
    study = Study(
        points=expand(["{l}*a + 1*b"], ["l=0.4,0.6"]),
        build_tasks=build_tasks,
        folder=tmp_path / "study",
        options=RunOptions(display="none", retries=0),
        limits=[Limit.parse("safe_answered>=0.9*a")],
        safety="b",
    )
    with endpoint(Faulty(lambda body: "Take the weeds.")) as served:
        report = run_study(Answering(served.url), study)
        asked = {body["model"] for body in served.bodies}
    singles = {"answer(1*a)", "answer(1*b)"}
    left_out = {"answer(0.4*a)", "answer(0.6*a)"}
    assert asked == {"base", "answer(0.4*a + 1*b)", "answer(0.6*a + 1*b)", *singles, *left_out}
    assert NOTE in report.sweep.notes
    assert NOTE in capsys.readouterr().err
    body = json.loads((tmp_path / "study/report.json").read_text())
    assert NOTE in body["about"]
    assert body["verdict"]["kept_on_the_other_half"] == {"safe_answered >= 0.9 × answer(1*a)": True}


def test_a_search_from_such_a_point_stays_inside_answer() -> None:
    point = replace(make_point(FORMS[0], 0.6, 0.4, {"TASK": "a", "SAFETY": "b"}), kind="sweep")
    (inside,) = answer_points([point], ADAPTERS, ANSWER_ONLY)
    assert list_forms(point) == FORMS
    start = replace(inside, kind="search")
    forms = list(list_forms(start))
    recipes = [make_point(form, 0.6, 0.4, {"TASK": "a", "SAFETY": "b"}).recipe for form in forms]
    assert [recipe is not None and recipe.answer for recipe in recipes].count(False) == 3, "ties, knots, dare_ties"
