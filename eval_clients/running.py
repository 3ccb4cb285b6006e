"""Run tasks for many models on one endpoint, all requests in flight together, resumable: Inspect's `eval_set`.

Every sample is on disk when it is done. A request is tried again a few times after a timeout, a broken stream, 429 or
5xx; a sample that still fails is kept as an error and counted apart. Running again with the same folder asks only what
is missing.
"""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inspect_ai import Task, eval_set
from inspect_ai.model import Model, get_model

from eval_clients.endpoint import Endpoint, EndpointError
from eval_clients.scoring.judge import ROLE

Display = Literal["full", "rich", "plain", "none"]
SETTINGS, FUSIONS = "run.json", "fusions.json"


class FolderError(ValueError):
    """The results folder holds another run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """How requests are sent. The defaults suit one server on this machine."""

    in_flight: int = 64
    """Requests at once over all models; about what the server batches (`--max-num-seqs`)."""
    retries: int = 4
    """Further attempts of one request."""
    seeds: int = 1
    """Answers to each prompt; more than one only makes sense with a temperature."""
    display: Display = "rich"
    judge: Model | None = None


def judge_model(name: str, endpoint: Endpoint | None) -> Model:
    """`name` at an OpenAI-compatible endpoint, or, without one, any model Inspect knows (`hf/…`, `openai/…`)."""
    if endpoint is not None:
        return endpoint.model(name)
    try:
        return get_model(name)
    except ValueError as error:
        raise EndpointError(f"no judge {name!r}: {error}; --judge-url names an endpoint that serves it") from None


def ready(folder: Path, resume: bool, settings: Mapping[str, object] | None = None) -> None:
    """Makes the folder of a run. FolderError when it holds results and `resume` is not wanted, or when these are of
    other `settings`: whatever decides what is asked.
    """
    logs, known = folder / "logs", folder / SETTINGS
    text = json.dumps(settings, indent=1, sort_keys=True, default=str) + "\n"
    if logs.is_dir() and any(logs.iterdir()):
        if not resume:
            raise FolderError(f"{str(folder)!r} holds results; --resume goes on with them, another --out starts anew")
        if settings is not None and known.is_file():
            kept = json.loads(known.read_text())
            differs = sorted(key for key, value in json.loads(text).items() if kept.get(key) != value)
            if differs:
                raise FolderError(
                    f"{str(folder)!r} holds results of another run: {', '.join(differs)} differ; choose another --out"
                )
    logs.mkdir(parents=True, exist_ok=True)
    if settings is not None:
        known.write_text(text)


def same_fusions(folder: Path, digests: Mapping[str, str]) -> None:
    """Keeps which fusion each model's answers are of, in `fusions.json`; FolderError when `folder` holds answers of
    another, since a name can mean other weights by now.
    """
    path = folder / FUSIONS
    kept = json.loads(path.read_text()) if path.is_file() else {}
    changed = [model for model, digest in digests.items() if kept.get(model, digest) != digest]
    if changed:
        raise FolderError(
            f"{str(folder)!r} holds answers of other adapters under the same names ({', '.join(changed[:3])}); "
            "choose another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**kept, **digests}, indent=1) + "\n")


def run(tasks: Sequence[Task], endpoint: Endpoint, models: Sequence[str], folder: Path, how: Running) -> bool:
    """Ask all `tasks` of all `models`; True when every sample has an answer and a score.

    Logs land in `folder`/logs, where `inspect view` shows them; results are read with `eval_clients.results`.
    Progress goes to stderr.
    """
    asked = len(tasks) * len(models)
    with contextlib.redirect_stdout(sys.stderr):
        complete, _ = eval_set(
            list(tasks),
            log_dir=str(folder / "logs"),
            model=[endpoint.model(name) for name in models],
            model_roles={} if how.judge is None else {ROLE: how.judge},
            retry_attempts=0,
            retry_immediate=False,
            fail_on_error=True,
            continue_on_fail=True,
            retry_on_error=1,
            epochs=how.seeds,
            max_tasks=asked,
            max_samples=max(2, 2 * how.in_flight // asked),  # of each task: what waits costs the server its cores
            max_connections=how.in_flight,
            max_retries=how.retries,
            log_dir_allow_dirty=True,
            log_realtime=False,  # its database of events took a quarter of this process's time
            log_buffer=1,
            ctl_server=False,
            score_display=False,
            display=how.display,
        )
    return bool(complete)
