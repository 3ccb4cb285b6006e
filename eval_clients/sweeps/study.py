"""A study: points and their controls measured, refined by a search, the best one chosen, all of it reported.

study = Study(points=expand(["{1-l}*task + {l}*safety"], ["l=0:1:0.1"]), build_tasks=…, folder=Path("sweep"))
report = run_study(Endpoint("http://127.0.0.1:3000/v1"), study)
"""

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from inspect_ai import Task

from eval_clients.answers import write_answers
from eval_clients.endpoint import Endpoint
from eval_clients.errors import EndpointError, LimitError
from eval_clients.results import JUDGED_MEASURES, write_results
from eval_clients.running import RunOptions
from eval_clients.sweeps.answer_only import NOTE, answer_points
from eval_clients.sweeps.choice import Limit
from eval_clients.sweeps.controls import build_controls
from eval_clients.sweeps.gates import measure_gate_controls
from eval_clients.sweeps.points import Point
from eval_clients.sweeps.report import BestPoint, write_report
from eval_clients.sweeps.search import refine_sweep
from eval_clients.sweeps.sweep import Sweep, measure_points
from eval_clients.tasks.logprobs import require_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What to measure, how to choose, and what the report says."""

    points: Sequence[Point]
    build_tasks: Callable[[], Sequence[Task]]
    """Builds the tasks that every point is asked; called anew for each wave."""
    folder: Path
    """Logs, answers and points; created by `prepare_folder`."""
    options: RunOptions = field(default_factory=RunOptions)
    limits: Sequence[Limit] = ()
    """What the best point must keep. A reference is a measured model, `base`, or an adapter's name."""
    safety: str = "safety"
    """The adapter that the controls leave out or replace."""
    control_points: Sequence[Point] | None = None
    """The points that controls are made from; None: all, empty: no controls."""
    search_budget: int = 0
    """Answers that the search may request; 0: no search."""
    search_safety: str = ""
    """The adapter whose weight the search varies; "": `safety`."""
    title: str = "Fusion sweep"
    command: str = ""
    """How to repeat the study, shown in the report."""
    about: Callable[[Sweep], Sequence[str]] = field(default=lambda sweep: ())
    """Sentences that open the report."""
    quoted: Collection[str] | None = None
    """The tasks whose prompts the report may show; None: all."""
    report_folder: Path | None = None
    """Where the report lands; None: `folder`."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a study found. `best` is None when no point but controls has answers; no report is written then."""

    sweep: Sweep
    best: BestPoint | None
    folder: Path


def run_study(endpoint: Endpoint, study: Study) -> Report:
    """Measure, search, choose and report; answers that `study.folder` already holds are not requested again.

    LimitError when a limit cannot be evaluated, EndpointError when the service rejects a point.
    """
    limits = _check_measures(endpoint, study)
    candidates = study.points if study.control_points is None else study.control_points
    answer_only = endpoint.answer_only()
    known = endpoint.adapters() if answer_only else []
    chosen, candidates = (answer_points(points, known, answer_only) for points in (study.points, candidates))
    notes = []
    if chosen is not study.points:
        print(NOTE, file=sys.stderr, flush=True)
        notes.append(NOTE)
    controls: list[Point] = []
    if candidates:
        controls, missing = build_controls(endpoint, candidates, study.safety, answer_only=answer_only)
        notes += missing
    points = [*chosen, *controls]
    limits = _check_references(limits, points)
    sweep = measure_points(endpoint, points, study.build_tasks, study.folder, study.options, notes=notes)
    if study.search_budget:
        sweep = _search(endpoint, study, sweep, limits)
    if candidates:
        sweep = measure_gate_controls(endpoint, sweep, candidates, study.build_tasks, study.folder, study.options)
    write_answers(study.folder, sweep.answers)
    folder = study.report_folder or study.folder
    folder.mkdir(parents=True, exist_ok=True)
    comparable = sweep.candidates("choose")
    if not any(point.kind != "control" and point.model in comparable for point in sweep.points):
        write_results(folder, sweep.answers)
        return Report(sweep, None, folder)
    best = write_report(
        folder,
        sweep,
        limits,
        title=study.title,
        command=study.command,
        about=study.about(sweep),
        quoted=study.quoted,
        page=endpoint.page() if sweep.plans else "",
    )
    return Report(sweep, best, folder)


def _check_measures(endpoint: Endpoint, study: Study) -> list[Limit]:
    """The limits with `base` resolved; LimitError when the tasks take no such measure."""
    samples = [sample for task in study.build_tasks() for sample in task.dataset]
    measures = {(sample.metadata or {}).get("measure") for sample in samples}
    for limit in study.limits:
        if limit.source not in measures or (limit.measure in JUDGED_MEASURES and study.options.judge is None):
            judged = " (it needs a judge)" if limit.measure in JUDGED_MEASURES else ""
            raise LimitError(f"limit '{limit}': none of the tasks measures {limit.measure}{judged}")
    base = endpoint.base()
    if "mmlu" in measures:
        require_logprobs(endpoint, base)
    return [limit.resolve("base", base) for limit in study.limits]


def _check_references(limits: Sequence[Limit], points: Sequence[Point]) -> list[Limit]:
    """The limits with adapters' names resolved; LimitError when a reference is not measured."""
    models = {point.model for point in points}
    forms = ("1*{}", "answer(1*{})", "answer({})")
    known = {limit: [m for form in forms if (m := form.format(limit.reference)) in models] for limit in limits}
    resolved = [limit.resolve(limit.reference, known[limit][0]) if known[limit] else limit for limit in limits]
    for limit in resolved:
        if limit.reference and limit.reference not in models:
            raise LimitError(
                f"limit '{limit}' compares with {limit.reference!r}, which is neither a point nor a control"
            )
    return resolved


def _search(endpoint: Endpoint, study: Study, sweep: Sweep, limits: Sequence[Limit]) -> Sweep:
    """The sweep after the search, or as it was with a note when the search cannot go on."""

    def measure(wider: Sweep) -> Sweep:
        measured = partial(measure_points, endpoint, wider.points, study.build_tasks, study.folder, study.options)
        return measured(plans=wider.plans, notes=wider.notes)

    cost = study.options.seeds * sum(len(task.dataset) for task in study.build_tasks())
    safety, budget = study.search_safety or study.safety, study.search_budget
    try:
        return refine_sweep(sweep, safety, limits, budget=budget, cost=cost, plan=endpoint.plan, measure=measure)
    except EndpointError as error:
        print(f"the search ended early: {error}", file=sys.stderr)
        return replace(sweep, notes=[*sweep.notes, f"the search ended early: {error}"])
