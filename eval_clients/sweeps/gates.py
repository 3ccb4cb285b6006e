"""Controls of a gate, from the weights that it chose: is it the prompt that counts, or only the weights on average?

* *constant gate*: every prompt gets the mean of the weights that the gate chose,
* *shuffled gate*: every prompt gets the weights that the gate chose for another prompt.

Both are fusions without a gate; the second is another one for every prompt.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from inspect_ai import Task, task_with
from inspect_ai.dataset import Sample
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.util import store

from adapters.recipes import Recipe
from eval_clients.answers import Answer, read_answers
from eval_clients.endpoint import PROVIDER, SENT_MODEL, Endpoint
from eval_clients.running import RunOptions, run_tasks
from eval_clients.sweeps.controls import COUNT, format_model, pick_evenly
from eval_clients.sweeps.points import Point
from eval_clients.sweeps.sweep import Sweep, measure_points, save_points

CONSTANT, SHUFFLED = "constant gate", "shuffled gate"
DIGITS = 4
"""Decimals of a chosen weight in a control's recipe."""
RECIPES = "fusion_recipes"
"""Key of a sample's metadata: the recipe to ask, by model."""
Weights = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Choices:
    """What the gate of a point chose for each prompt, within its recipe's bounds."""

    point: Point
    recipe: Recipe
    answers: Sequence[Answer]
    """Those that say which weights ran."""

    @classmethod
    def read(cls, point: Point, answers: Iterable[Answer]) -> "Choices | None":
        """The choices in a point's answers; None when it has no gate, or none of its answers says them."""
        recipe = point.recipe
        if recipe is None or recipe.gate is None:
            return None
        adapters = {name for name, _ in recipe.gate.bounds}
        known = [answer for answer in answers if answer.model == point.model and adapters <= answer.weights.keys()]
        return cls(point, recipe, known) if known else None

    def weigh(self, answer: Answer) -> dict[str, float]:
        """The weights of the adapters that the gate chooses for."""
        assert self.recipe.gate is not None
        return {name: answer.weights[name] for name, _ in self.recipe.gate.bounds}

    def average(self, answers: Sequence[Answer] | None = None) -> dict[str, float]:
        """The mean of the weights; of all answers that the client did not begin, where there are any."""
        chosen = answers or [answer for answer in self.answers if not answer.opening] or self.answers
        weights = [self.weigh(answer) for answer in chosen]
        return {name: fmean(one[name] for one in weights) for name in weights[0]}

    def format(self, weights: Weights) -> str:
        """The recipe without its gate, at these weights."""
        return format_model(self.recipe.choose({name: round(weight, DIGITS) for name, weight in weights.items()}))

    def constant(self) -> Point:
        """The control with the mean weights."""
        return Point(self.format(self.average()), "control", CONSTANT, self.point.values)

    def shuffled(self) -> Point:
        """The control with the weights of other prompts; its name is no recipe, since there is one per prompt."""
        return Point(f"shuffle({self.point.model})", "control", SHUFFLED, self.point.values)

    def shuffle(self, seed: int = 0) -> dict[tuple[str, str], str]:
        """Recipe by prompt and opening: each prompt's is that of the next one in a random order of its half, so that no
        prompt gets its own where a half has two.
        """
        chosen = {(answer.prompt, answer.opening): self.weigh(answer) for answer in reversed(self.answers)}
        recipes: dict[tuple[str, str], str] = {}
        for half in sorted({answer.half for answer in self.answers}):
            members = [answer for answer in self.answers if answer.half == half]
            any_opening = {answer.prompt: self.weigh(answer) for answer in reversed(members)}
            prompts = sorted(any_opening)
            random.Random(seed).shuffle(prompts)
            others = dict(zip(prompts, [*prompts[1:], *prompts[:1]], strict=True))
            for answer in members:
                other = others[answer.prompt]
                weights = chosen.get((other, answer.opening), any_opening[other])
                recipes[answer.prompt, answer.opening] = self.format(weights)
        return recipes

    def summarize(self) -> dict[str, Any]:
        """The mean weights by what the prompts are for, and how often the gate failed, for a report."""
        measures = sorted({answer.measure for answer in self.answers})
        by_measure = {name: [answer for answer in self.answers if answer.measure == name] for name in measures}
        return {
            "answers": len(self.answers),
            "defaults": sum(answer.gate == "default" for answer in self.answers),
            "mean": self.average(),
            **{f"mean_{name}": self.average(members) for name, members in by_measure.items()},
        }


def measure_gate_controls(
    endpoint: Endpoint,
    sweep: Sweep,
    candidates: Sequence[Point],
    build_tasks: Callable[[], Sequence[Task]],
    folder: Path,
    options: RunOptions,
) -> Sweep:
    """The sweep with both controls of up to `COUNT` of the candidates that have a gate; a note for each that cannot be
    measured.
    """
    gated = [point for point in candidates if (recipe := point.recipe) is not None and recipe.gate is not None]
    incomplete, notes, known = {gap.model for gap in sweep.answers.missing}, list(sweep.notes), []
    for point in pick_evenly(gated, COUNT):
        choices = None if point.model in incomplete else Choices.read(point, sweep.answers.items)
        if choices is None:
            why = "lacks answers" if point.model in incomplete else "does not say which weights its gate chose"
            notes.append(f"controls of a gate are missing: {point.model} {why}")
        else:
            known.append(choices)
    if not known:
        return replace(sweep, notes=notes)
    points = [*sweep.points, *(one.constant() for one in known)]
    wider = measure_points(endpoint, points, build_tasks, folder, options, plans=sweep.plans, notes=notes)
    return _measure_shuffled(endpoint, wider, known, build_tasks, folder, options)


def _measure_shuffled(
    endpoint: Endpoint,
    sweep: Sweep,
    known: Sequence[Choices],
    build_tasks: Callable[[], Sequence[Task]],
    folder: Path,
    options: RunOptions,
) -> Sweep:
    recipes = {one.shuffled().model: (one.shuffle(), one.format(one.average())) for one in known}
    tasks = [task for task in build_tasks() if not any(measures(sample) == "mmlu" for sample in task.dataset)]
    if not tasks:
        return sweep
    for task in tasks:
        for sample in task.dataset:
            metadata = sample.metadata or {}
            key = str(sample.input), str(metadata.get("opening", ""))
            sample.metadata = {**metadata, RECIPES: {m: by.get(key, mean) for m, (by, mean) in recipes.items()}}
        task_with(task, setup=ask_other_recipe())
    points = [*sweep.points, *(one.shuffled() for one in known)]
    save_points(folder, points)
    run_tasks(tasks, endpoint, [*recipes], folder, options)
    return replace(sweep, points=points, answers=read_answers(folder))


def measures(sample: Sample) -> str:
    """What a sample's answer is evidence of."""
    return str((sample.metadata or {}).get("measure", ""))


@solver
def ask_other_recipe() -> Solver:
    """Asks the recipe that the sample's metadata names for the model."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        name = str(state.model).removeprefix(PROVIDER)
        store().set(SENT_MODEL + name, state.metadata[RECIPES][name])
        return state

    return solve
