"""The search over weights, on a service whose answers follow a formula."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from adapters.recipes import parse
from eval_clients.answers import Answer, Answers
from eval_clients.endpoint import Plan
from eval_clients.errors import EndpointError
from eval_clients.sweeps.choice import Limit, choose_best
from eval_clients.sweeps.points import Point, expand
from eval_clients.sweeps.report import HALVES
from eval_clients.sweeps.search import FORMS, MAX_WEIGHT, make_neighbors, make_point, refine_sweep
from eval_clients.sweeps.sweep import Sweep

ADAPTERS = {"TASK": "task", "SAFETY": "safe"}
PROMPTS = 40
COST = 4 * PROMPTS
"""Harmful and harmless prompts, in both halves."""
LIMITS = [Limit.parse("harm<=0.05")]


def harm_and_help(point: Point) -> tuple[float, float]:
    """Safety weight lowers harm and, beyond 0.7, help; only the sum keeps both."""
    recipe = point.recipe
    assert recipe is not None
    if not recipe.is_sum:
        return 0.9, 0.5
    weight = recipe.weights.get("safe", 0.0)
    assert isinstance(weight, float)
    return max(0.0, 0.8 - weight * 1.1), 1.0 - max(0.0, weight - 0.7)


@dataclass
class Service:
    """Plans and measures as a fusion service would; refuses recipes that begin with one of `refused`."""

    refused: tuple[str, ...] = ()
    rounds: list[int] = field(default_factory=list)

    def plan(self, recipe: str) -> Plan:
        if recipe.startswith(self.refused):
            raise EndpointError(f"the service rejected {recipe!r}: no such method")
        return Plan("digest", True, recipe, 0.0)

    def measure(self, sweep: Sweep) -> Sweep:
        self.rounds.append(len(sweep.points))
        answers = [
            Answer(point.model, measure, f"{half}-{n}", 1, measure, "", half, "p", "a", {"answered": float(n < hits)})
            for point in sweep.points
            for measure, share in zip(("harm", "safe"), harm_and_help(point), strict=True)
            for half in HALVES
            for n, hits in ((n, round(share * PROMPTS)) for n in range(PROMPTS))
        ]
        return replace(sweep, answers=Answers(answers))

    def start(self, templates: Sequence[str] = ("{1-l}*task + {l}*safe",)) -> Sweep:
        points = expand(templates, ["l=0.3,0.5"])
        return self.measure(Sweep(points, {point.model: self.plan(point.model) for point in points}, Answers([])))


def refine(service: Service, sweep: Sweep, budget: int) -> Sweep:
    return refine_sweep(sweep, "safe", LIMITS, budget=budget, cost=COST, plan=service.plan, measure=service.measure)


def test_a_search_finds_weights_that_keep_the_limits() -> None:
    service = Service()
    sweep = refine(service, service.start(), 60 * COST)
    scores = sweep.candidates("choose")
    best, missed = choose_best(scores, LIMITS, scores)
    weight = parse(best).weights["safe"]
    assert missed == 0
    assert isinstance(weight, float)
    assert 0.65 < weight <= 0.75


@pytest.mark.parametrize("points", [0, 1, 7, 20])
def test_a_search_asks_for_no_more_than_its_budget(points: int) -> None:
    service = Service()
    start = service.start()
    sweep = refine(service, start, points * COST + COST - 1)
    assert len(sweep.points) - len(start.points) == points


def test_a_search_without_a_budget_limit_ends() -> None:
    service = Service()
    assert len(refine(service, service.start(), 10**9).points) < 200


def test_a_refused_form_is_left_out_with_a_note_once() -> None:
    service = Service(refused=("knots", "ties"))
    sweep = refine(service, service.start(), 30 * COST)
    assert not [point for point in sweep.points if point.model.startswith(service.refused)]
    notes = [note for note in sweep.notes if "knots" in note]
    assert notes == ["left out of the search: the service rejected 'knots(0.5*task + 0.5*safe)': no such method"]


def test_a_search_without_a_sum_of_two_to_start_from_is_refused() -> None:
    service = Service()
    for templates in (["{l}*task"], ["{l}*task + {l}*safe + 1*other"], ["ties({l}*task + 1*safe, density=0.5)"]):
        with pytest.raises(EndpointError, match="starts from a sum of one adapter with 'safe'"):
            refine(service, service.start(templates), 10 * COST)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_a_recipe_over_the_two_adapters(form: str) -> None:
    recipe = make_point(form, 0.6, 0.4, ADAPTERS).recipe
    assert recipe is not None
    assert recipe.adapters == ("safe", "task")


def test_neighbors_stay_inside_the_bounds_and_keep_the_form() -> None:
    corner = make_point(FORMS[1], MAX_WEIGHT, 0.0, ADAPTERS)
    near = make_neighbors(corner, 0.1, ADAPTERS)
    assert {(point.values["t"], point.values["s"]) for point in near} == {(1.4, 0.0), (1.5, 0.1), (1.4, 0.1)}
    assert {point.series for point in near} == {FORMS[1]}
