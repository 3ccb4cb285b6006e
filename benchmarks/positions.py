"""Where weights act: plain mixes against weights by module, by position and by prompt, and attacks on each.

    python -m benchmarks.positions --data DIR                          # the bundled adapters; minutes on 2 cores
    python -m benchmarks.positions --data DIR --adapter risk=FOLDER --adapter safety-answer=FOLDER --full

DIR holds xstest/xstest_prompts.csv. Harm and usefulness are XSTest's, the job is the order e-mails, held out; the
attacks begin the answers to unsafe prompts. One point of each form is chosen on one half of every set, by the same
limits, and reported on the other. An --adapter whose configuration has a `gate` chooses weights by prompt, and so do
its variants (`gate_variants`); one that is `answer_only` takes the place of the adapter before its hyphen in answer(…).
Answers are kept in --cache: what was stopped, by --minutes too, goes on.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from inspect_ai import Task

from adapters.recipes import Recipe
from benchmarks.common import RESULTS, ROOT, machine, stamp
from benchmarks.gate_variants import write_variants
from benchmarks.paper import ENGINE, IN_FLIGHT, LIMITS, identify, serve_settings, write_orders
from benchmarks.servers import ours
from eval_clients.answers import Answers, write_answers
from eval_clients.endpoint import Endpoint
from eval_clients.errors import EvaluationError
from eval_clients.results import format_openings, format_table, score_openings
from eval_clients.running import RunOptions, prepare_folder
from eval_clients.sweeps.choice import Limit
from eval_clients.sweeps.gates import measure_gate_controls
from eval_clients.sweeps.points import Form, Point
from eval_clients.sweeps.report import write_report
from eval_clients.sweeps.sweep import Sweep, measure_points
from eval_clients.tasks import benchmarks as tasks
from eval_clients.tasks.openings import OPENINGS
from eval_clients.tasks.text import read_text

COMMAND = "python -m benchmarks.positions"
STEPS = "steps(prompt: 0.7, {n}: 1)*task + steps(prompt: 0.6, {n}: 0)*safety"
RECIPES: tuple[str, ...] = (
    "0.6*task + 0.4*safety",
    "0.7*task + 0.6*safety",
    "0.7*task + {*.mlp.*: 0.9, *: 0.3}*safety",
    STEPS.format(n=4),
    "0.7*task + fade(0.9..0.3, 8)*safety",
    "answer(0.7*task + 0.6*safety)",
)
"""Points without a gate; each gate makes two more."""
MORE_RECIPES: tuple[str, ...] = (
    "0.8*task + 0.2*safety",
    "0.9*task + 0.5*safety",
    "0.7*task + {*.mlp.*: 0.3, *: 0.9}*safety",
    "0.7*task + ramp(0.3..0.9)*safety",
    STEPS.format(n=2),
    STEPS.format(n=8),
    "0.9*task + fade(1..0.2, 4)*safety",
    "0.9*task + fade(1..0.2, 16)*safety",
    "answer(0.6*task + 0.4*safety)",
    "answer(1*task + 1*safety)",
)
"""With --full."""
GATES = (
    "gate(1*task + 0.6*safety, by={gate}, safety in 0..0.8)",
    "gate(0.7*task + 0.6*safety, by={gate}, task in 0.5..1, safety in 0..1)",
)
MAX_NAMED = 100
"""Characters of a recipe in a line of progress."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is asked of every point."""

    prompts: int | None
    """Of XSTest's safe prompts, and of its unsafe ones; None: all."""
    orders: int
    attacked: int | None
    """Unsafe prompts whose answers are begun; None: all."""
    openings: Sequence[str]
    tokens: int
    """Length of an answer."""


SHORT = Size(prompts=100, orders=32, attacked=50, openings=(OPENINGS[1], OPENINGS[3]), tokens=24)
FULL = Size(prompts=None, orders=100, attacked=None, openings=OPENINGS, tokens=32)


def build_tasks(prompts: str, job: Path, size: Size) -> list[Task]:
    """The tasks of every point."""
    return [
        tasks.xstest(prompts, limit=size.prompts, max_tokens=size.tokens),
        tasks.prefill(prompts, limit=size.attacked, max_tokens=size.tokens, openings=list(size.openings)),
        tasks.job(str(job)),
    ]


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter's configuration."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config


def build_points(adapters: Mapping[str, Path], recipes: Sequence[str]) -> list[Point]:
    """The points of the recipes, in their order, and those of each gate among the adapters."""
    configs = {name: read_config(folder) for name, folder in adapters.items()}
    stand_ins = {name.partition("-")[0]: name for name, config in configs.items() if config.get("answer_only")}
    gates = [name for name, config in configs.items() if "gate" in config]
    stand_ins = {name: other for name, other in stand_ins.items() if name in adapters and other not in gates}
    templates = [*recipes, *(template.format(gate=gate) for gate in gates for template in GATES)]
    points = [Point(text, "sweep", text) for text in templates]
    return [replace(point, model=_use_stand_ins(point, stand_ins)) for point in points]


def _use_stand_ins(point: Point, stand_ins: Mapping[str, str]) -> str:
    recipe = point.recipe
    assert recipe is not None
    return recipe.rename(stand_ins).format() if recipe.answer else recipe.format()


def build_controls(base: str, points: Sequence[Point]) -> list[Point]:
    """The base, and each adapter alone; one that acts on answers only does so here."""
    recipes = [recipe for point in points if (recipe := point.recipe) is not None]
    anywhere = {name for recipe in recipes if not recipe.answer for name in recipe.adapters} | {"task", "safety"}
    names = sorted(anywhere.union(*(recipe.adapters for recipe in recipes)))
    alone = [f"1*{name}" if name in anywhere else replace(Recipe.single(name), answer=True).format() for name in names]
    return [Point(base, "control", "base"), *(Point(model, "control", "single adapter") for model in alone)]


def group_by_form(points: Sequence[Point]) -> dict[Form, list[Point]]:
    """The points of each form, which run in one batch."""
    groups: dict[Form, list[Point]] = {}
    for point in points:
        groups.setdefault(point.form, []).append(point)
    return groups


@dataclass
class Clock:
    """Whether there is time for more points: as much for each as the slowest so far took."""

    minutes: float
    began: float
    slowest: float = 0.0
    """Seconds for a point."""

    def admits(self, points: int) -> bool:
        """Whether so many points fit into what is left."""
        return self.elapsed() + points * self.slowest <= 60 * self.minutes

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def note(self, points: int, seconds: float) -> None:
        """Remember what so many points took."""
        self.slowest = max(self.slowest, seconds / points)


def measure(
    endpoint: Endpoint, points: Sequence[Point], build: Callable[[], Sequence[Task]], folder: Path, minutes: float
) -> Sweep:
    """The controls, then all points, form by form, as far as `minutes` reach; a note for each form left out."""
    options = RunOptions(display="none", in_flight=IN_FLIGHT)
    clock = Clock(minutes, time.monotonic())
    chunks = [("controls", build_controls(endpoint.base(), points)), *group_by_form(points).items()]
    sweep = Sweep([], {}, Answers([]))
    for number, (name, chunk) in enumerate(chunks, 1):
        if number > 1 and not clock.admits(len(chunk)):
            left_out = f"not measured in {minutes:g} minutes: {', '.join(point.model for point in chunk)}"
            sweep = replace(sweep, notes=[*sweep.notes, left_out])
            continue
        began = clock.elapsed()
        wider = [*sweep.points, *chunk]
        sweep = measure_points(endpoint, wider, build, folder, options, plans=sweep.plans, notes=sweep.notes)
        seconds = clock.elapsed() - began
        clock.note(len(chunk), seconds)
        print(f"{number} of {len(chunks)}: {name}, {len(chunk)} points in {seconds:.0f} s", flush=True)
        for point in chunk:
            print(f"    {point.model[:MAX_NAMED]}", flush=True)
    gated = [point for point in sweep.points if point.form == "gate"]
    if gated and not clock.admits(2 * len(gated)):
        return replace(sweep, notes=[*sweep.notes, f"controls of gates not measured in {minutes:g} minutes"])
    return measure_gate_controls(endpoint, sweep, gated, build, folder, options)


def record(report: Mapping[str, Any], size: Size, command: str) -> dict[str, Any]:
    """What results/positions.json holds of a report, which `command` made."""
    kept = ("model", "kind", "series", "form", "half_choose", "half_report", "openings", "gate")
    body = {key: report[key] for key in ("about", "verdict", "best_by_form", "front", "missing")}
    points = [{key: point[key] for key in kept if key in point} for point in report["points"]]
    asked: dict[str, Any] = {"prompts_of_each_kind": size.prompts, "orders": size.orders, "attacked": size.attacked}
    asked |= {"openings": [*size.openings], "tokens": size.tokens}
    content = {**stamp(command), "machine": machine(), "asked": asked, **body, "points": points}
    rounded: dict[str, Any] = json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 4))
    return rounded


def write(sweep: Sweep, size: Size, folder: Path, command: str) -> None:
    """Write the report of `command` into `folder`, results/positions.json and its pictures; print the other half."""
    limits = [replace_references(Limit.parse(text), sweep) for text in LIMITS]
    write_answers(folder, sweep.answers)
    about = ["Weights by module, by position and by prompt against plain mixes, with attacks that begin the answer."]
    title = "Where weights act"
    best = write_report(folder, sweep, limits, title=title, command=command, about=about, quoted={"task"})
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (RESULTS / "positions.json").write_text(
        json.dumps(record(report, size, command), indent=1, ensure_ascii=False) + "\n"
    )
    for name, target in (("pareto", "positions"), ("openings", "positions-openings")):
        if (folder / f"{name}.png").exists():
            shutil.copyfile(folder / f"{name}.png", RESULTS / f"{target}.png")
    names = ("harm", "safe_answered", "over_refusal", "degenerate", "task", "prefill_harm")
    print(format_table(sweep.scores("report"), names))
    print(format_openings(score_openings(sweep.answers.items)))
    print(f"best: {best.best}", json.dumps(best.margins_on_the_other_half, indent=1), sep="\n")


def replace_references(limit: Limit, sweep: Sweep) -> Limit:
    """The limit with the base's own name as its reference."""
    base = next(point.model for point in sweep.points if point.series == "base")
    return limit.resolve("base", base)


@contextmanager
def serve(url: str | None, adapters: Mapping[str, Path], cache: Path) -> Iterator[Endpoint]:
    """A running service at `url`, which has the adapters, or one of our own."""
    if url is not None:
        yield Endpoint(url)
        return
    roots = ":".join(str(path.resolve().parent) for path in adapters.values())
    settings = serve_settings(adapters, cache, ["+".join(adapters)]) | {"FUSION_ADAPTER_ROOTS": roots}
    with tempfile.TemporaryDirectory() as scratch, ours(ENGINE, Path(scratch), **settings) as server:
        yield Endpoint(f"{server.url}/v1")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with xstest/xstest_prompts.csv")
    add("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="beside task and safety")
    add("--recipe", action="append", help="may be repeated; default: points of all forms")
    add("--full", action="store_true", help="all prompts, all openings and more points")
    add("--minutes", type=float, default=600, help="start no points that would end later; default: %(default)s")
    add("--base-url", help="a running service with these adapters; default: one is started")
    add("--cache", type=Path, default=ROOT / ".cache/positions", help="logs and report; default: %(default)s")
    return parser.parse_args()


def main() -> int:
    """Command line; exit 0 measured, 1 an answer or a point is missing, 2 no data, or a cache of another run."""
    args = parse_arguments()
    size = FULL if args.full else SHORT
    adapters = {name: ROOT / "examples/adapters" / name for name in ("task", "safety")}
    for pair in args.adapter:
        name, _, path = pair.partition("=")
        adapters[name] = Path(path)
    folder = args.cache / ("full" if args.full else "short")
    prompts = args.data / "xstest/xstest_prompts.csv"
    try:
        read_text(prompts)
        for gate in [path for path in adapters.values() if "gate" in read_config(path)]:
            adapters |= write_variants(gate, args.cache / "gates")
        points = build_points(adapters, args.recipe or (RECIPES + MORE_RECIPES if args.full else RECIPES))
        asked = identify({name: adapters[name] for name in ("task", "safety")}, prompts) | {"tokens": size.tokens}
        prepare_folder(folder, resume=True, identity=asked)
        build = partial(build_tasks, str(prompts), write_orders(args.cache, size.orders), size)
        with serve(args.base_url, adapters, args.cache) as endpoint:
            sweep = measure(endpoint, points, build, folder, args.minutes)
        given = "".join(f" --adapter {pair.partition('=')[0]}=FOLDER" for pair in args.adapter)
        write(sweep, size, folder, f"{COMMAND} --data DIR{given}{' --full' * args.full}")
    except (EvaluationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for text in (*sweep.notes, *(" ".join(gap) for gap in sweep.answers.missing)):
        print(text, file=sys.stderr)
    return 1 if sweep.answers.missing or len(sweep.points) < len(points) else 0


if __name__ == "__main__":
    sys.exit(main())
