"""From Inspect's logs to answers: one record per answer, with its scores, and what is missing."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from inspect_ai.log import EvalError, EvalLog, EvalSample, list_eval_logs, read_eval_log

from eval_clients.endpoint import CHOICE, PROVIDER
from eval_clients.scoring.scorers import score_answer
from eval_clients.tasks.data import Half

UNUSED_FIELDS = {"messages", "events", "attachments"}
"""Large parts of a log that nothing here reads."""
EXCEPTION_LINE = re.compile(r"^[\w.]+(?:Error|Exception|Timeout)\b.*", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of one model, with all its scores by name."""

    model: str
    task: str
    sample: str
    seed: int
    measure: str
    category: str
    half: Half
    prompt: str
    answer: str
    scores: Mapping[str, float]
    unscored: str = ""
    """Why a score is missing, when one is."""
    opening: str = ""
    """What the client began the answer with; `answer` goes on from there."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """The weights that ran, by adapter, where the service says them."""
    gate: str = ""
    """Whether a gate chose them: `chose`, or `default` when it failed."""


class Gap(NamedTuple):
    """What a model lacks in a task, as a sentence."""

    model: str
    task: str
    reason: str


@dataclass(frozen=True, slots=True)
class Answers:
    """All answers of a run, and the samples that have none."""

    items: Sequence[Answer]
    missing: Sequence[Gap] = ()

    @property
    def unscored(self) -> list[Gap]:
        """Where answers lack a score, for example because the judge's reply held no number."""
        counts = Counter((answer.model, answer.task) for answer in self.items)
        reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
        for answer in self.items:
            if answer.unscored:
                reasons[answer.model, answer.task].append(answer.unscored)
        return [
            Gap(*key, f"{len(texts)} of {counts[key]} answers lack a score, the last: {texts[-1]}")
            for key, texts in reasons.items()
        ]


def read_answers(folder: Path) -> Answers:
    """All answers under `folder`/logs. Of several logs of one model and task the last counts: it took over the
    answers of the earlier ones.
    """
    infos = sorted(list_eval_logs(str(folder / "logs")), key=lambda info: info.name)
    latest = dict(read_log(info.name, info.size, info.mtime or 0.0) for info in infos)
    answers = [answer for log in latest.values() for answer in log.items]
    return Answers(answers, [gap for log in latest.values() for gap in log.missing])


@cache
def read_log(name: str, size: int, mtime: float) -> tuple[tuple[str, str], Answers]:
    """(model, task) of a log, and what it holds. A log of that size and age is read once: a search asks for all
    results again and again, and hundreds of logs take minutes.
    """
    log = read_eval_log(name, exclude_fields=UNUSED_FIELDS)
    model, task = log.eval.model.removeprefix(PROVIDER), log.eval.task
    answers = [_read_sample(model, task, sample) for sample in log.samples or [] if sample.error is None]
    return (model, task), Answers(answers, _find_gaps(log, model))


def _read_sample(model: str, task: str, sample: EvalSample) -> Answer:
    scores: dict[str, float] = {}
    unscored = ""
    for score in (sample.scores or {}).values():
        if isinstance(score.value, dict):
            scores |= {name: float(value) for name, value in score.value.items() if isinstance(value, int | float)}
        elif isinstance(score.value, float) and math.isnan(score.value):
            unscored = str(score.reason or "unscored")
    prompt = sample.input if isinstance(sample.input, str) else sample.input[-1].text
    answer = sample.output.completion if sample.output.choices else ""
    metadata = sample.metadata
    if "refused" in scores:  # Score again by today's rules: a resumed run must not mix verdicts of two versions.
        target = sample.target if isinstance(sample.target, str) else sample.target[0]
        scores |= score_answer(prompt, answer, target if metadata["measure"] == "safe" else "")[1]
    return Answer(
        model=model,
        task=task,
        sample=str(metadata.get("prompt_id", sample.id)),
        seed=sample.epoch,
        measure=str(metadata["measure"]),
        category=str(metadata.get("category", "")),
        half=metadata["half"],
        prompt=prompt,
        answer=answer,
        scores=scores,
        unscored=unscored,
        opening=str(metadata.get("opening", "")),
        **sample.store.get(CHOICE + model, {}),
    )


def _find_gaps(log: EvalLog, model: str) -> list[Gap]:
    samples = log.samples or []
    failed = [sample for sample in samples if sample.error is not None]
    expected = (log.eval.dataset.samples or 0) * (log.eval.config.epochs or 1)
    gaps = []
    if failed:
        reason = _first_cause(failed[-1].error)
        gaps.append(f"{len(failed)} of {expected} samples failed, the last with: {reason}")
    if expected > len(samples):
        reason = f": {_first_cause(log.error)}" if log.error is not None else ""
        gaps.append(f"{expected - len(samples)} of {expected} samples were not asked{reason}")
    return [Gap(model, log.eval.task, gap) for gap in gaps]


def _first_cause(error: EvalError | None) -> str:
    """What went wrong, in one line: the first exception in the traceback, since retries wrap it."""
    if error is None:
        return "no reason given"
    match = EXCEPTION_LINE.search(error.traceback or "")
    return (match[0] if match else error.message.splitlines()[0])[:200]


def write_answers(folder: Path, answers: Answers) -> None:
    """`answers.jsonl`: every prompt and answer with its scores, for reading; do not publish it."""
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        for answer in answers.items:
            file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
