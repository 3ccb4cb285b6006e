"""The command line of `eval_clients`: its parser, and one function per command."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

try:
    from inspect_ai import Task
except ImportError:
    sys.exit("error: eval_clients needs Inspect AI; install it with: pip install 'lora-fusion[eval]'")

from eval_clients.answers import Answers, read_answers, write_answers
from eval_clients.endpoint import Endpoint
from eval_clients.errors import EvaluationError, UsageError
from eval_clients.results import MEANS, SHARES, average_mmlu, format_results, format_table, list_results, write_results
from eval_clients.running import (
    Display,
    RunOptions,
    check_fusions,
    check_prompts,
    prepare_folder,
    resolve_judge,
    run_tasks,
)
from eval_clients.sets import (
    COLUMN_HELP,
    DATA_HELP,
    Set,
    add_data_check,
    parse_columns,
    read_task_options,
    run_data_check,
    show_sets,
    write_readings,
)
from eval_clients.sweeps.choice import Limit
from eval_clients.sweeps.points import expand
from eval_clients.tasks.benchmarks import BENCHMARKS, build_task
from eval_clients.tasks.data import hash_files
from eval_clients.tasks.logprobs import logprob_faults, require_logprobs
from eval_clients.votes import VOTES_HELP, add_votes, run_votes

DESCRIPTION = """\
Measure models and fusions through an OpenAI-compatible endpoint.

    %(prog)s xstest --data xstest_prompts.csv --model base --model "0.6*task + 0.4*safety"
    SWEEP --recipe "{1-l}*task + {l}*safety" --grid l=0:1:0.1 --tasks xstest,task \\
        --data xstest=xstest_prompts.csv --data task=orders.jsonl --limit "harm<=0.05" --out sweep
    %(prog)s data check xstest_prompts.csv    # how is this file read?
    %(prog)s check        # are the endpoint's echo and log-probabilities correct?

EVAL_BASE_URL and EVAL_API_KEY name another endpoint. Results land in --out: results.json, results.csv, answers.jsonl,
data.json (how the data was read), and Inspect's logs (`inspect view --log-dir OUT/logs`).
Exit status: 0 done, 1 answers are missing (run again with --resume), 2 invalid input.
"""
URL = "http://127.0.0.1:3000/v1"
MODEL_HELP = "model, profile or recipe; may be repeated; default: base"
MINIMUMS = {"retries": 0, "search": 0} | dict.fromkeys(
    ("in_flight", "timeout", "seeds", "samples", "max_tokens", "task_max_tokens"), 1
)
"""The smallest values of the numeric options."""
NOT_IN_IDENTITY = {
    *("out", "resume", "json", "display", "in_flight", "timeout", "retries", "publish"),
    *("limit", "search", "base_url", "invocation"),
}
"""Options that do not decide what is asked, so that a resumed run may change them."""


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-url", default=os.environ.get("EVAL_BASE_URL", URL), help="default: %(default)s")
    parser.add_argument("--api-key-env", default="EVAL_API_KEY", metavar="NAME", help="variable with the API key")
    parser.add_argument("--timeout", type=int, default=600, metavar="S", help="per attempt; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_endpoint(parser)
    add = parser.add_argument
    add("--out", type=Path, help="folder of the results; default: results/COMMAND")
    add("--resume", action="store_true", help="continue in a folder that holds results")
    add("--in-flight", type=int, default=64, metavar="N", help="concurrent requests; default: %(default)s")
    add("--retries", type=int, default=4, metavar="N", help="further attempts; default: %(default)s")
    add("--seeds", type=int, default=1, metavar="N", help="answers to each prompt, with --temperature")
    add("--temperature", type=float, default=0.0, help="default: 0, greedy")
    longest = "longest answer, the same for all models; default: 64, task 96, mt_bench 512"
    add("--max-tokens", type=int, metavar="N", help=longest)
    add("--judge", metavar="MODEL", help="judge: a model at --judge-url, or any of Inspect's (hf/…)")
    add("--judge-url", metavar="URL", help="OpenAI-compatible endpoint of the judge, ending in /v1")
    add("--judge-key-env", default="JUDGE_API_KEY", metavar="NAME", help="variable with its API key")
    add("--display", choices=("full", "rich", "plain", "none"), help="progress; default: rich on terminals, else plain")


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    template = "a recipe with expressions in braces, {1-l}*task + {l}*safety; may be repeated"
    add("--recipe", action="append", required=True, metavar="TEMPLATE", help=template)
    grid = "the values of a variable, l=0:1:0.1 or l=0,0.5,1; may be repeated"
    add("--grid", action="append", default=[], metavar="VAR=FIRST:LAST:STEP", help=grid)
    add("--tasks", required=True, help=f"comma-separated, from {','.join(BENCHMARKS)}")
    add("--data", action="append", default=[], metavar="TASK=PATH", help="data of a task")
    add("--column", action="append", metavar="TASK:ROLE=NAME", help=COLUMN_HELP)
    samples = "at most N prompts of a task (xstest: N of each kind)"
    add("--samples", action="append", default=[], metavar="TASK=N", help=samples)
    add("--task-max-tokens", type=int, metavar="N", help="longest answer of `task`; default: 96")
    limit = "what the best point must meet: harm<=0.05, safe_answered>=0.9*base, degenerate<=base+0.02; "
    limit += f"may be repeated; measures: {', '.join((*SHARES, *MEANS))}"
    add("--limit", action="append", default=[], metavar="LIMIT", help=limit)
    add("--safety", default="safety", metavar="ADAPTER", help="the adapter the controls leave out; default: safety")
    add("--no-controls", action="store_true", help="measure the grid alone")
    add("--search", type=int, default=0, metavar="N", help="refine around the best point, for at most N answers")
    add("--publish", action="store_true", help="attach the scorecards to the fusions' digests")
    _add_run(parser)


def build_parser(prog: str) -> argparse.ArgumentParser:
    """All commands and options, under the program's name."""
    sweep = f"{prog.removesuffix(' eval')} sweep"  # `lora-fusion sweep` is a command of its own
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION.replace("SWEEP", sweep))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.needs, description=benchmark.create.__doc__)
        command.add_argument("--data", required=True, metavar="PATH", help=benchmark.needs)
        command.add_argument("--column", action="append", metavar="ROLE=NAME", help=COLUMN_HELP)
        command.add_argument("--model", action="append", metavar="NAME", help=MODEL_HELP)
        command.add_argument("--samples", type=int, metavar="N", help="at most N prompts, the same for every model")
        _add_run(command)
    what = "every point of a grid of recipes, with controls and a report"
    _add_sweep(commands.add_parser("sweep", help=what, description=f"Measure {what}."))
    add_data_check(commands.add_parser("data", help=DATA_HELP))
    add_votes(commands.add_parser("votes", help=VOTES_HELP))
    what = "test whether the endpoint's echo and log-probabilities are correct"
    check = commands.add_parser("check", help=what, description=f"{what.capitalize()}.")
    check.add_argument("--model", action="append", metavar="NAME", help=MODEL_HELP)
    _add_endpoint(check)
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m eval_clients") -> int:
    """Run a command; the exit status. `argv` defaults to the process's arguments; `prog` is what usage texts and
    reports call the program.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(prog).parse_args(argv)
    args.invocation = f"{prog} {shlex.join(argv)}"
    offline = {"data": run_data_check, "votes": run_votes}
    if args.command not in ("check", *offline):
        args.out = args.out or Path("results") / args.command
    command = {"sweep": run_sweep, "check": run_check}.get(args.command, run_benchmark)
    try:
        if args.command in offline:
            return offline[args.command](args)
        return command(args, Endpoint(args.base_url, os.environ.get(args.api_key_env, "none"), args.timeout))
    except (EvaluationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; continue with the same command and --resume", file=sys.stderr)
        return 130


def run_benchmark(args: argparse.Namespace, endpoint: Endpoint) -> int:
    """Measure one or many models on one benchmark."""
    options = read_options(args)
    sets = {args.command: Set(args.data, parse_columns(args.column or ()))}
    task = _build_task(args.command, sets[args.command], args, args.samples)
    readings, base = show_sets(sets), endpoint.base()
    models = list(dict.fromkeys(base if name == "base" else name for name in args.model or ["base"]))
    # A misspelled name is reported once here, not by every sample.
    fusions = [name for name in models if name != base] if endpoint.is_fusion_service() else []
    digests = {name: endpoint.plan(name).digest for name in fusions}
    if args.command == "hexphi" and args.judge is None:
        print("no --judge: answers are only sorted into refused, answered, degenerate", file=sys.stderr)
    if args.command == "mmlu":
        require_logprobs(endpoint, base)
    prepare_folder(args.out, args.resume, identify_run(args, base, {args.command: args.data}))
    check_prompts(args.out, [task])
    write_readings(args.out, readings)
    check_fusions(args.out, digests)
    run_tasks([task], endpoint, models, args.out, options)
    answers = read_answers(args.out)
    write_results(args.out, answers)
    write_answers(args.out, answers)
    if groups := average_mmlu(answers.items):
        (args.out / "mmlu.json").write_text(json.dumps(groups, indent=1) + "\n")
    if args.json:
        missing = [list(gap) for gap in answers.missing]
        print(json.dumps({"data": readings, "models": list_results(answers.items), "missing": missing}, indent=1))
    else:
        print(format_results(answers.items))
    return report_gaps(answers)


def run_sweep(args: argparse.Namespace, endpoint: Endpoint) -> int:
    """Measure a grid of recipes with controls and search, and report the best point."""
    # These load torch and matplotlib, which the benchmarks do without.
    from eval_clients.sweeps.study import Study, run_study
    from eval_clients.sweeps.sweep import publish_scorecards

    sets, counts = read_task_options(args)

    def build_tasks() -> list[Task]:
        return [_build_task(name, one, args, counts.get(name)) for name, one in sets.items()]

    study = Study(
        points=expand(args.recipe, args.grid),
        build_tasks=build_tasks,
        folder=args.out,
        options=read_options(args),
        limits=[Limit.parse(text) for text in args.limit],
        safety=args.safety,
        control_points=() if args.no_controls else None,
        search_budget=args.search,
        command=args.invocation,
    )
    tasks, readings = build_tasks(), show_sets(sets)
    paths = {name: one.path for name, one in sets.items()}
    identity = identify_run(args, endpoint.base(), paths)
    prepare_folder(args.out, args.resume, identity)
    check_prompts(args.out, tasks)
    write_readings(args.out, readings)
    report = run_study(endpoint, study)
    sweep, best = report.sweep, report.best
    if best is not None:
        if args.publish:
            date, data = f"{datetime.now(UTC):%Y-%m-%d}", identity["content"]
            provenance = {"date": date, "command": args.invocation, "tasks": args.tasks, "data": data}
            count = publish_scorecards(endpoint, sweep, provenance)
            print(f"{count} scorecards attached", file=sys.stderr)
        if args.json:
            print(json.dumps(best.to_json(), indent=1))
        else:
            limits = "keeps all limits" if best.kept_where_chosen else "no point keeps all limits; nearest"
            print(f"{format_table(sweep.scores())}\n\nbest point ({limits}): {best.best}")
            print(f"report: {report.folder / 'report.html'}")
    return report_gaps(sweep.answers)


def run_check(args: argparse.Namespace, endpoint: Endpoint) -> int:
    """Check the endpoint's echo and log-probabilities for each model."""
    base = endpoint.base()
    models = dict.fromkeys(base if name == "base" else name for name in args.model or ["base"])
    faults = {model: logprob_faults(endpoint, model) for model in models}
    if args.json:
        print(json.dumps(faults, indent=1))
    else:
        for model, sentences in faults.items():
            print(f"{model}: {'; '.join(sentences) or 'echo and log-probabilities are consistent'}")
    return 1 if any(faults.values()) else 0


def _build_task(name: str, one: Set, args: argparse.Namespace, samples: int | None) -> Task:
    if BENCHMARKS[name].judge == "required" and args.judge is None:
        raise UsageError(f"{name} needs a --judge (and --judge-url)")
    longest = args.task_max_tokens if name == "task" and args.command == "sweep" else args.max_tokens
    judged = args.judge is not None
    options = {"samples": samples, "max_tokens": longest, "temperature": args.temperature, "judged": judged}
    return build_task(name, one.path, columns=one.columns, **options)


def read_options(args: argparse.Namespace) -> RunOptions:
    """How to send the requests; UsageError for numbers that are out of range or contradict each other."""
    for option, minimum in MINIMUMS.items():
        value = getattr(args, option, None)
        if isinstance(value, int) and value < minimum:
            raise UsageError(f"--{option.replace('_', '-')} {value}: expected at least {minimum}")
    if args.seeds > 1 and args.temperature == 0:
        raise UsageError("--seeds would repeat the same greedy answer; give a --temperature above 0 as well")
    judge = None
    if args.judge is not None:
        key = os.environ.get(args.judge_key_env, "none")
        judge = resolve_judge(args.judge, Endpoint(args.judge_url, key, args.timeout) if args.judge_url else None)
    display: Display = args.display or ("rich" if sys.stderr.isatty() else "plain")
    return RunOptions(in_flight=args.in_flight, retries=args.retries, seeds=args.seeds, display=display, judge=judge)


def identify_run(args: argparse.Namespace, base: str, sets: Mapping[str, str]) -> dict[str, object]:
    """What decides what is asked, with the digests of the `sets` (paths by task): a folder holds one such run."""
    options = {
        name: value for name, value in vars(args).items() if name not in NOT_IN_IDENTITY and not name.endswith("_env")
    }
    if options.get("column") is None:
        options.pop("column", None)  # runs of earlier versions have no such key
    return {**options, "base": base, "content": {name: hash_files(Path(path)) for name, path in sets.items()}}


def report_gaps(answers: Answers) -> int:
    """Print what is missing and what has no score to stderr; the exit status."""
    for kind, gaps in (("unscored", answers.unscored), ("missing", answers.missing)):
        for model, task, reason in gaps:
            print(f"{kind}: {model} {task}: {reason}", file=sys.stderr)
    if answers.missing:
        print("run the same command with --resume to complete it", file=sys.stderr)
    return 1 if answers.missing else 0
