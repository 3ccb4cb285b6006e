"""Run tasks for many models on one endpoint, all requests in flight together, resumable: Inspect's `eval_set`.

Every sample is on disk when it is done. A request is tried again a few times after a timeout, a broken stream, 429 or
5xx; a sample that still fails is kept as an error and counted apart. Running again with the same folder asks only what
is missing.
"""

import contextlib
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import inspect_ai
from inspect_ai import Task, eval_set
from inspect_ai.log import list_eval_logs, read_eval_log, read_eval_log_sample_summaries
from inspect_ai.model import Model, get_model

from eval_clients.endpoint import Endpoint
from eval_clients.errors import EndpointError, FolderError, RunError
from eval_clients.scoring.judge import ROLE

Display = Literal["full", "rich", "plain", "none"]
SETTINGS, FUSIONS = "run.json", "fusions.json"
CUT_AT = 900
"""Characters of a prompt that Inspect's summaries hold at least."""


def _require(module: str, name: str) -> Any:
    """A private name of Inspect; ImportError when this version has none."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        version = inspect_ai.__version__
        raise ImportError(
            f"inspect-ai {version} has no {module}.{name}; install the version in pyproject.toml"
        ) from None


PrerequisiteError: type[Exception] = _require("inspect_ai._util.error", "PrerequisiteError")
"""What Inspect raises when a model's package or a setting is missing; no public module exports it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How requests are sent. The defaults suit one server on this machine."""

    in_flight: int = 64
    """Requests at once over all models; about what the server batches (`--max-num-seqs`)."""
    retries: int = 4
    """Further attempts of one request."""
    seeds: int = 1
    """Answers to each prompt; more than one only makes sense with a temperature."""
    display: Display = "rich"
    """How Inspect shows progress, on stderr."""
    judge: Model | None = None
    """The model that judges answers, where a task is built to be judged."""


def resolve_judge(name: str, endpoint: Endpoint | None) -> Model:
    """`name` at an OpenAI-compatible endpoint, or, without one, any model Inspect knows (`hf/…`, `openai/…`)."""
    if endpoint is not None:
        return endpoint.model(name)
    try:
        return get_model(name)
    except (ValueError, PrerequisiteError) as error:
        raise EndpointError(
            f"judge {name!r} is unknown to Inspect ({error}); name the endpoint that serves it with --judge-url"
        ) from None


def prepare_folder(folder: Path, resume: bool, identity: Mapping[str, object] | None = None) -> None:
    """Create the folder of a run. FolderError when it holds results and `resume` is not wanted, or when these have
    another `identity`: whatever decides what is asked.
    """
    logs, path = folder / "logs", folder / SETTINGS
    text = json.dumps(identity, indent=1, sort_keys=True, default=str) + "\n"
    if logs.is_dir() and any(logs.iterdir()):
        if not resume:
            raise FolderError(f"{str(folder)!r} holds results; continue them with --resume, or choose another --out")
        if identity is not None and path.is_file():
            recorded = json.loads(path.read_text())
            differing = sorted(key for key, value in json.loads(text).items() if recorded.get(key) != value)
            if differing:
                raise FolderError(
                    f"{str(folder)!r} holds results of another run ({', '.join(differing)} differ); choose a new --out"
                )
    logs.mkdir(parents=True, exist_ok=True)
    if identity is not None:
        path.write_text(text)


def check_fusions(folder: Path, digests: Mapping[str, str]) -> None:
    """Record in `fusions.json` which fusion each model's answers come from. FolderError when `folder` holds answers of
    another fusion: the same name may mean other weights by now.
    """
    path = folder / FUSIONS
    recorded = json.loads(path.read_text()) if path.is_file() else {}
    changed = [model for model, digest in digests.items() if recorded.get(model, digest) != digest]
    if changed:
        raise FolderError(
            f"{str(folder)!r} holds answers of other adapters under the same names ({', '.join(changed[:3])}); "
            "choose another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**recorded, **digests}, indent=1) + "\n")


def check_prompts(folder: Path, tasks: Sequence[Task]) -> None:
    """FolderError when `folder` holds answers to other prompts under the same ids: a file that an earlier version read
    otherwise would mix both readings.
    """
    prompts = {task.name: {str(sample.id): sample.input for sample in task.dataset} for task in tasks}
    seen = set()
    for info in list_eval_logs(str(folder / "logs")):
        name = read_eval_log(info, header_only=True).eval.task
        if name in seen or name not in prompts:
            continue  # all logs of a task hold the same prompts
        for summary in read_eval_log_sample_summaries(info):
            seen.add(name)
            asked, prompt = summary.input, prompts[name].get(str(summary.id))
            if isinstance(asked, str) and isinstance(prompt, str) and not _is_same(asked, prompt):
                raise FolderError(
                    f"{str(folder)!r} holds answers to other prompts of {name} (sample {summary.id}): its data is read "
                    "otherwise now; choose a new --out"
                )


def _is_same(asked: str, prompt: str) -> bool:
    """Whether a log's prompt, which may be cut, is the beginning of this one."""
    return asked == prompt or (len(asked) > CUT_AT and prompt.startswith(asked[:CUT_AT]))


def run_tasks(
    tasks: Sequence[Task], endpoint: Endpoint, models: Sequence[str], folder: Path, options: RunOptions
) -> bool:
    """Run all `tasks` on all `models`; True when every sample has an answer and a score.

    Logs land in `folder`/logs, where `inspect view` shows them; `eval_clients.answers` reads them. Progress goes to
    stderr. RunError when Inspect cannot start.
    """
    runs = len(tasks) * len(models)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            complete, _ = eval_set(
                list(tasks),
                log_dir=str(folder / "logs"),
                model=[endpoint.model(name) for name in models],
                model_roles={} if options.judge is None else {ROLE: options.judge},
                retry_attempts=0,
                retry_immediate=False,
                fail_on_error=True,
                continue_on_fail=True,
                retry_on_error=1,
                epochs=options.seeds,
                max_tasks=runs,
                max_samples=max(2, 2 * options.in_flight // runs),  # per task: what waits costs the server its cores
                max_connections=options.in_flight,
                max_retries=options.retries,
                log_dir_allow_dirty=True,
                log_realtime=False,  # its database of events took a quarter of this process's time
                log_buffer=1,
                ctl_server=False,
                score_display=False,
                display=options.display,
            )
        except PrerequisiteError as error:
            raise RunError(f"Inspect cannot start the run: {error}") from None
    return bool(complete)
