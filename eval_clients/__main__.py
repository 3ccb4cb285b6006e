"""Measure models and fusions through an OpenAI-compatible endpoint.

    python -m eval_clients xstest --data xstest_prompts.csv --model base --model "0.6*task + 0.4*safety"
    python -m eval_clients sweep --recipe "{1-l}*task + {l}*safety" --grid l=0:1:0.1 --tasks xstest,task \\
        --data xstest=xstest_prompts.csv --data task=orders.jsonl --limit "harm<=0.05" --out sweep
    python -m eval_clients check        # are the endpoint's answers and log-probabilities what they claim to be?

EVAL_BASE_URL and EVAL_API_KEY name another endpoint. Results land in --out: results.json, results.csv, answers.jsonl,
and Inspect's logs (`inspect view --log-dir OUT/logs`).
Exit status: 0 done, 1 something is missing (run again with --resume), 2 bad input.
"""

import argparse
import asyncio
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

try:
    from inspect_ai import Task
    from inspect_ai._util.error import PrerequisiteError
except ImportError:
    sys.exit("eval_clients needs Inspect AI, which serving does not; install it with: make setup-dev")

from eval_clients.endpoint import Endpoint, EndpointError, Plan
from eval_clients.results import JUDGED, MEANS, SHARES, Answers, lines, read, table, write, write_answers
from eval_clients.running import Display, FolderError, Running, judge_model, ready, run, same_fusions
from eval_clients.sweeps.choice import Limit, LimitError
from eval_clients.sweeps.points import TemplateError, expand
from eval_clients.tasks import benchmarks as tasks
from eval_clients.tasks import mmlu
from eval_clients.tasks.data import DataError, digest_of
from eval_clients.tasks.logprobs import self_test

URL = "http://127.0.0.1:3000/v1"
BENCHMARKS: dict[str, tuple[Callable[..., Task], str]] = {
    "hexphi": (tasks.hexphi, "folder of category_1.csv … category_11.csv; judged"),
    "advbench": (tasks.advbench, "CSV with a `goal` column"),
    "harmful_csv": (tasks.harmful_csv, "CSV with one column or a header, or JSONL with `prompt`"),
    "harmless": (tasks.harmless, "JSONL with `prompt`: what is refused here is refused wrongly"),
    "xstest": (tasks.xstest, "xstest_prompts.csv: safe prompts answered, unsafe ones refused"),
    "mmlu": (tasks.mmlu, "folder in Hendrycks' layout (dev/, test/); letters' log-probabilities"),
    "mt_bench": (tasks.mt_bench, "folder with question.jsonl and reference_answer*.jsonl; judged"),
    "task": (tasks.job, "JSONL with `prompt` and `answer`: exact match"),
}
"""Name on the command line: the task, and the data it takes."""
MODEL = "model, profile or recipe; may be repeated; default: base"
MAY_BE_JUDGED = ("hexphi", "advbench", "harmful_csv", "task")
LEAST = {
    "in_flight": 1,
    "timeout": 1,
    "retries": 0,
    "seeds": 1,
    "samples": 1,
    "max_tokens": 1,
    "task_max_tokens": 1,
    "search": 0,
}
"""The smallest values of the options that are numbers."""


class UsageError(ValueError):
    """Arguments that do not fit together."""


def _endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-url", default=os.environ.get("EVAL_BASE_URL", URL), help="default: %(default)s")
    parser.add_argument("--api-key-env", default="EVAL_API_KEY", metavar="NAME", help="variable with the API key")
    parser.add_argument("--timeout", type=int, default=600, metavar="S", help="of one attempt; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def _common(parser: argparse.ArgumentParser) -> None:
    _endpoint(parser)
    parser.add_argument("--out", type=Path, help="folder of the results; default: results/COMMAND")
    parser.add_argument("--resume", action="store_true", help="go on in a folder that holds results")
    parser.add_argument("--in-flight", type=int, default=64, metavar="N", help="requests at once; default: %(default)s")
    parser.add_argument("--retries", type=int, default=4, metavar="N", help="further attempts; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="answers to each prompt, with --temperature")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest answer, the same for all models; default: 64, task 96, mt_bench 512",
    )
    parser.add_argument("--judge", metavar="MODEL", help="judge: a model at --judge-url, or any of Inspect's (hf/…)")
    parser.add_argument("--judge-url", metavar="URL", help="OpenAI-compatible endpoint of the judge, ending in /v1")
    parser.add_argument("--judge-key-env", default="JUDGE_API_KEY", metavar="NAME", help="variable with its API key")
    parser.add_argument("--display", choices=("full", "rich", "plain", "none"), help="progress; default: by terminal")


def arguments() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = argparse.ArgumentParser(prog="python -m eval_clients", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (make_task, needs) in BENCHMARKS.items():
        one = commands.add_parser(name, help=needs, description=make_task.__doc__)
        one.add_argument("--data", required=True, metavar="PATH", help=needs)
        one.add_argument("--model", action="append", metavar="NAME", help=MODEL)
        one.add_argument("--samples", type=int, metavar="N", help="at most N prompts, the same for every model")
        _common(one)
    what = "every point of a grid of recipes, with controls and a report"
    many = commands.add_parser("sweep", help=what, description=f"Measure {what}.")
    many.add_argument(
        "--recipe",
        action="append",
        required=True,
        metavar="TEMPLATE",
        help="a recipe with expressions in braces, {1-l}*task + {l}*safety; may be repeated",
    )
    many.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="VAR=FIRST:LAST:STEP",
        help="the values of a variable, l=0:1:0.1 or l=0,0.5,1; may be repeated",
    )
    many.add_argument("--tasks", required=True, help=f"of {','.join(BENCHMARKS)}")
    many.add_argument("--data", action="append", default=[], metavar="TASK=PATH", help="data of a task")
    many.add_argument(
        "--samples",
        action="append",
        default=[],
        metavar="TASK=N",
        help="at most N prompts of a task (xstest: N of each)",
    )
    many.add_argument("--task-max-tokens", type=int, metavar="N", help="longest answer of `task`; default: 96")
    many.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="LIMIT",
        help="what the best point must keep: harm<=0.05, safe_answered>=0.9*base, degenerate<=base+0.02; "
        f"may be repeated; measures: {', '.join((*SHARES, *MEANS))}",
    )
    many.add_argument("--safety", default="safety", metavar="ADAPTER", help="the adapter the controls leave out")
    many.add_argument("--no-controls", action="store_true", help="measure the grid alone")
    many.add_argument("--search", type=int, default=0, metavar="REQUESTS", help="refine within so many requests")
    many.add_argument("--publish", action="store_true", help="attach the scorecards to the fusions' digests")
    _common(many)
    what = "tell a broken endpoint from a weak model"
    check = commands.add_parser("check", help=what, description=f"By echo and log-probabilities, {what}.")
    check.add_argument("--model", action="append", metavar="NAME", help=MODEL)
    _endpoint(check)
    return parser


def pairs(given: Sequence[str], option: str) -> dict[str, str]:
    """`NAME=VALUE` options by name; UsageError for one that is none, or of no benchmark."""
    found = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or name not in BENCHMARKS:
            raise UsageError(f"{option} {text!r}: TASK=VALUE is expected, TASK one of {', '.join(BENCHMARKS)}")
        found[name] = value
    return found


def made(name: str, path: str, args: argparse.Namespace, samples: int | None) -> Task:
    """The benchmark's task over the user's data."""
    options: dict[str, object] = {"path": path, "limit": samples}
    if name == "mt_bench" and args.judge is None:
        raise UsageError("mt_bench needs a --judge (and --judge-url)")
    if name != "mmlu":
        options["temperature"] = args.temperature
        longest = args.task_max_tokens if name == "task" and args.command == "sweep" else args.max_tokens
        if longest is not None:
            options["max_tokens"] = longest
    if name in MAY_BE_JUDGED:
        options["judged"] = args.judge is not None
    return BENCHMARKS[name][0](**options)


def running(args: argparse.Namespace) -> Running:
    """How to send the requests; UsageError when numbers make no sense."""
    for option, least in LEAST.items():
        given = getattr(args, option, None)
        if isinstance(given, int) and given < least:
            raise UsageError(f"--{option.replace('_', '-')} is at least {least}")
    if args.seeds > 1 and args.temperature == 0:
        raise UsageError("--seeds asks the same greedy answer again; give a --temperature above 0 as well")
    judge = None
    if args.judge is not None:
        key = os.environ.get(args.judge_key_env, "none")
        judge = judge_model(args.judge, Endpoint(args.judge_url, key, args.timeout) if args.judge_url else None)
    display: Display = args.display or ("rich" if sys.stderr.isatty() else "plain")
    return Running(
        in_flight=args.in_flight,
        retries=args.retries,
        seeds=args.seeds,
        display=display,
        judge=judge,
    )


def told(answers: Answers) -> int:
    """Says what is missing and what has no score; the exit status."""
    for model, task, sentence in answers.unscored:
        print(f"unscored: {model} {task}: {sentence}", file=sys.stderr)
    for model, task, sentence in answers.missing:
        print(f"missing: {model} {task}: {sentence}", file=sys.stderr)
    if answers.missing:
        print("run the same command with --resume to complete it", file=sys.stderr)
    return 1 if answers.missing else 0


def benchmark(args: argparse.Namespace, endpoint: Endpoint) -> int:
    """One benchmark for one or many models."""
    how, base = running(args), endpoint.base()
    models = list(dict.fromkeys(base if name == "base" else name for name in args.model or ["base"]))
    # A misspelt name is told once here, not by every sample.
    fused = [name for name in models if name != base] if endpoint.fuses() else []
    digests = {name: Plan.of(endpoint, name).digest for name in fused}
    todo = made(args.command, args.data, args, args.samples)
    if args.command == "hexphi" and args.judge is None:
        print("no --judge: answers are only sorted into refused, answered, degenerate", file=sys.stderr)
    if args.command == "mmlu":
        sound(endpoint, base)
    ready(args.out, args.resume, settings(args, base, {args.command: args.data}))
    same_fusions(args.out, digests)
    run([todo], endpoint, models, args.out, how)
    answers = read(args.out)
    write(args.out, answers)
    write_answers(args.out, answers)
    found = lines(answers.rows)
    grouped = {}
    if args.command == "mmlu":
        for model in found:
            by_subject: dict[str, list[float]] = {}
            for row in answers.rows:
                if row.model == model:
                    by_subject.setdefault(row.category, []).append(row.scores["exact"])
            grouped[model] = mmlu.summary(by_subject)
        (args.out / "mmlu.json").write_text(json.dumps(grouped, indent=1) + "\n")
    if args.json:
        body = [one.to_json() | ({"mmlu_groups": grouped[one.model]} if grouped else {}) for one in found.values()]
        print(json.dumps({"models": body, "missing": [list(one) for one in answers.missing]}, indent=1))
    else:
        print(table(found))
        for model, levels in grouped.items():
            parts = {**levels["all"], **levels["categories"]}
            print(f"{model}: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in parts.items()))
    return told(answers)


def swept(args: argparse.Namespace, endpoint: Endpoint) -> int:
    """A sweep, its controls, its search, its report."""
    from eval_clients.sweeps.report import make  # these load torch and matplotlib, which the benchmarks do without
    from eval_clients.sweeps.search import search
    from eval_clients.sweeps.sweep import controls, scorecards, sweep

    names = list(dict.fromkeys(args.tasks.split(",")))
    paths, counts = pairs(args.data, "--data"), pairs(args.samples, "--samples")
    for name in names:
        if name not in BENCHMARKS:
            raise UsageError(f"--tasks {name!r}: one of {', '.join(BENCHMARKS)} is expected")
        if name not in paths:
            raise UsageError(f"--tasks {name!r} needs its data: --data {name}=PATH ({BENCHMARKS[name][1]})")
        if not counts.get(name, "1").isdigit() or counts.get(name) == "0":
            raise UsageError(f"--samples {name}={counts[name]}: a whole number from 1 is expected")

    def all_tasks() -> list[Task]:
        return [made(n, paths[n], args, int(counts[n]) if n in counts else None) for n in names]

    limits = [Limit.parse(text) for text in args.limit]
    points, how = expand(args.recipe, args.grid), running(args)
    base = endpoint.base()
    limits = [limit.named("base", base) for limit in limits]
    taken = {sample.metadata["measure"] for task in all_tasks() for sample in task.dataset if sample.metadata}
    for limit in limits:
        if limit.needs not in taken or (limit.measure in JUDGED and args.judge is None):
            raise UsageError(f"--limit {str(limit)!r}: none of the --tasks measures {limit.measure}")
    if "mmlu" in names:
        sound(endpoint, base)
    ready(args.out, args.resume, settings(args, base, {name: paths[name] for name in names}))
    notes: list[str] = []
    if not args.no_controls:
        more, notes = controls(endpoint, points, args.safety)
        points = [*points, *more]
    measured = {point.model for point in points}
    limits = [limit.named(limit.of, f"1*{limit.of}") if f"1*{limit.of}" in measured else limit for limit in limits]
    for limit in limits:
        if limit.of and limit.of not in measured:
            raise UsageError(f"--limit {str(limit)!r} compares with {limit.of!r}, which is no point or control")
    found = sweep(endpoint, points, all_tasks, args.out, how, notes=notes)
    if args.search:
        try:
            found = search(endpoint, found, args.safety, limits, all_tasks, args.out, how, args.search)
        except EndpointError as error:
            found = replace(found, notes=[*found.notes, f"the search ended early: {error}"])
            print(f"the search ended early: {error}", file=sys.stderr)
    write_answers(args.out, found.answers)
    if not any(point.kind != "control" for point in found.points if point.model in found.candidates("choose")):
        write(args.out, found.answers)  # no point to report on
        return told(found.answers)
    command = "python -m eval_clients " + shlex.join(sys.argv[1:])
    result = make(args.out, found, limits, title="Fusion sweep", command=command)
    if args.publish:
        when = f"{datetime.now(UTC):%Y-%m-%d}"
        count = scorecards(endpoint, found, {"date": when, "command": command, "tasks": args.tasks})
        print(f"{count} scorecards attached", file=sys.stderr)
    print(json.dumps(result, indent=1) if args.json else table(found.lines()))
    if not args.json:
        kept = "keeps all limits" if result["kept_where_chosen"] else "no point keeps all limits; nearest"
        print(f"\nbest point ({kept}): {result['best']}\nreport: {args.out / 'report.html'}")
    return told(found.answers)


def tested(endpoint: Endpoint, model: str) -> list[str]:
    """What is broken in the endpoint's log-probabilities."""

    async def test() -> list[str]:
        async with endpoint.client() as client:
            return await self_test(client, model)

    return asyncio.run(test())


def sound(endpoint: Endpoint, model: str) -> None:
    """EndpointError when MMLU cannot be measured here: thousands of requests would say so one by one."""
    if faults := tested(endpoint, model):
        raise EndpointError(f"mmlu needs echo and logprobs of {endpoint.base_url}: {'; '.join(faults)}")


UNASKED = {
    "out",
    "resume",
    "json",
    "display",
    "in_flight",
    "timeout",
    "retries",
    "publish",
    "limit",
    "search",
    "base_url",
}


def settings(args: argparse.Namespace, base: str, sets: Mapping[str, str]) -> dict[str, object]:
    """What decides what is asked, and the digests of the `sets`: results of others are not mixed with these."""
    given = {name: value for name, value in vars(args).items() if name not in UNASKED and not name.endswith("_env")}
    return {**given, "base": base, "content": {name: digest_of(Path(path)) for name, path in sets.items()}}


def checked(args: argparse.Namespace, endpoint: Endpoint) -> int:
    """The self-test of an endpoint, for each model."""
    faults: dict[str, list[str]] = {}
    base = endpoint.base()
    for name in args.model or [base]:
        model = base if name == "base" else name
        faults[model] = tested(endpoint, model)
    if args.json:
        print(json.dumps(faults, indent=1))
    else:
        for model, found in faults.items():
            print(f"{model}: {'; '.join(found) or 'echo and log-probabilities are what they claim to be'}")
    return 1 if any(faults.values()) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    args = arguments().parse_args(argv)
    try:
        if args.command != "check":
            args.out = args.out or Path("results") / args.command
        endpoint = Endpoint(args.base_url, os.environ.get(args.api_key_env, "none"), args.timeout)
        return {"sweep": swept, "check": checked}.get(args.command, benchmark)(args, endpoint)
    except (DataError, EndpointError, FolderError, LimitError, TemplateError, UsageError, PrerequisiteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
