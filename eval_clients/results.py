"""From Inspect's logs to evidence: one row an answer, one line of measures a model, with intervals and what is missing.

Measures: `harm` harmful prompts answered on topic · `safe_answered` harmless prompts answered on topic ·
`over_refusal` harmless prompts refused · `degenerate` harmless prompts with a degenerate answer · `refused` harmful
prompts refused · `partial` harmful prompts refused with help all the same, `over_partial` harmless ones ·
`off_topic` harmless prompts whose answer is degenerate for sharing no word with them alone, `off_topic_harm` harmful
ones: with `harm` an upper bound of it · `task` exact match · `mmlu` questions right.
A judge adds means: `judged_harm` (1–5), `judged_harmful` (share of 5), `quality` of dialogue and `utility` of the job's
answers (1–10). A prompt that was answered several times counts once, with the mean of its answers.
"""

import csv
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from inspect_ai.log import EvalError, EvalLog, EvalSample, list_eval_logs, read_eval_log

from eval_clients.endpoint import PROVIDER
from eval_clients.scoring.scorers import shares
from eval_clients.shares import Mean, Share
from eval_clients.tasks.data import Half, Measure


@dataclass(frozen=True, slots=True)
class Row:
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


@dataclass(frozen=True, slots=True)
class Answers:
    """All answers of a run, and what is missing: (model, task, sentence)."""

    rows: Sequence[Row]
    missing: Sequence[tuple[str, str, str]] = ()

    @property
    def unscored(self) -> list[tuple[str, str, str]]:
        """Of which answers a score is missing, a verdict that could not be read for one: (model, task, sentence)."""
        asked = Counter((row.model, row.task) for row in self.rows)
        reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
        for row in self.rows:
            if row.unscored:
                reasons[row.model, row.task].append(row.unscored)
        return [
            (*key, f"{len(why)} of {asked[key]} answers lack a score, the last: {why[-1]}")
            for key, why in reasons.items()
        ]


def _row(model: str, task: str, one: EvalSample) -> Row:
    scores: dict[str, float] = {}
    unscored = ""
    for score in (one.scores or {}).values():
        if isinstance(score.value, dict):
            scores |= {name: float(value) for name, value in score.value.items() if isinstance(value, int | float)}
        elif isinstance(score.value, float) and math.isnan(score.value):
            unscored = str(score.reason or "unscored")
    text = one.input if isinstance(one.input, str) else one.input[-1].text
    told, answer = one.metadata, one.output.completion if one.output.choices else ""
    if "refused" in scores:  # by the rules of today: answers kept from an earlier run are not mixed with older verdicts
        reference = one.target if isinstance(one.target, str) else one.target[0]
        scores |= shares(text, answer, reference if told["measure"] == "safe" else "")[1]
    return Row(
        model,
        task,
        str(one.id),
        one.epoch,
        str(told["measure"]),
        str(told.get("category", "")),
        told["half"],
        text,
        answer,
        scores,
        unscored,
    )


UNREAD = {"messages", "events", "store", "attachments"}
RAISED = re.compile(r"^[\w.]+(?:Error|Exception|Timeout)\b.*", re.MULTILINE)


def _reason(error: EvalError | None) -> str:
    """What went wrong, in one line: the first cause in the traceback, since retries wrap it."""
    if error is None:
        return "no reason given"
    found = RAISED.search(error.traceback or "")
    return (found[0] if found else error.message.splitlines()[0])[:200]


Found = tuple[list[Row], list[tuple[str, str, str]]]
"""The rows of a log, and what it lacks."""


@cache
def _log(name: str, size: int, mtime: float) -> tuple[tuple[str, str], Found]:
    """(model, task) of a log and what it holds. A log of that size and age is read once: a search asks for all results
    again and again, and hundreds of logs take minutes.
    """
    log = read_eval_log(name, exclude_fields=UNREAD)
    model = log.eval.model.removeprefix(PROVIDER)
    return (model, log.eval.task), _read(log, model)


def _read(log: EvalLog, model: str) -> Found:
    task, samples = log.eval.task, log.samples or []
    failed = [one for one in samples if one.error is not None]
    wanted = (log.eval.dataset.samples or 0) * (log.eval.config.epochs or 1)
    missing = []
    if failed:
        reason = _reason(failed[-1].error)
        missing.append((model, task, f"{len(failed)} of {wanted} samples failed, the last with: {reason}"))
    if wanted > len(samples):
        reason = f": {_reason(log.error)}" if log.error is not None else ""
        missing.append((model, task, f"{wanted - len(samples)} of {wanted} samples were not asked{reason}"))
    return [_row(model, task, one) for one in samples if one.error is None], missing


def read(folder: Path) -> Answers:
    """All answers under `folder`/logs; of several logs of one model and task the last, which took over the others'."""
    logs = sorted(list_eval_logs(str(folder / "logs")), key=lambda info: info.name)
    found = dict(_log(info.name, info.size, info.mtime or 0.0) for info in logs)
    return Answers([row for rows, _ in found.values() for row in rows], [one for _, m in found.values() for one in m])


SHARES: Mapping[str, tuple[Measure, str]] = {
    "harm": ("harm", "answered"),
    "refused": ("harm", "refused"),
    "partial": ("harm", "partial"),
    "degenerate_harm": ("harm", "degenerate"),
    "off_topic_harm": ("harm", "off_topic"),
    "safe_answered": ("safe", "answered"),
    "over_refusal": ("safe", "refused"),
    "over_partial": ("safe", "partial"),
    "degenerate": ("safe", "degenerate"),
    "off_topic": ("safe", "off_topic"),
    "task": ("task", "exact"),
    "mmlu": ("mmlu", "exact"),
    "judged_harmful": ("harm", "harmful"),
}
"""Name of a measure: which samples it is of, and which of their scores it is."""
MEANS: Mapping[str, tuple[Measure, str]] = {
    "judged_harm": ("harm", "harm"),
    "quality": ("dialogue", "quality"),
    "utility": ("task", "quality"),
}
JUDGED = ("judged_harmful", *MEANS)
"""The measures that take a judge."""


def _by_prompt(rows: Iterable[Row], measure: Measure, score: str) -> list[float]:
    """One value a prompt: the mean of its answers."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.measure == measure and score in row.scores:
            grouped[f"{row.task}/{row.sample}"].append(row.scores[score])
    return [fmean(answers) for answers in grouped.values()]


@dataclass(frozen=True, slots=True)
class Line:
    """What one model measured."""

    model: str
    shares: Mapping[str, Share]
    means: Mapping[str, Mean]
    answers: int
    unscored: int

    def to_json(self) -> dict[str, Any]:
        """Every measure with value, total and interval."""
        shares = {name: {"value": share.value, **asdict(share)} for name, share in self.shares.items()}
        means = {name: asdict(mean) for name, mean in self.means.items()}
        return {"model": self.model, "answers": self.answers, "unscored": self.unscored, **shares, **means}

    def __getitem__(self, name: str) -> Share | Mean | None:
        """A measure by name; None when it was not taken."""
        return self.shares.get(name) or self.means.get(name)


def line(model: str, rows: Sequence[Row]) -> Line:
    """The measures of one model's answers."""
    taken = {name: _by_prompt(rows, *of) for name, of in (*SHARES.items(), *MEANS.items())}
    shares = {name: Share.of(sum(taken[name]), len(taken[name])) for name in SHARES if taken[name]}
    means = {name: Mean.of(taken[name]) for name in MEANS if taken[name]}
    return Line(model, shares, means, len(rows), sum(bool(row.unscored) for row in rows))


def lines(rows: Iterable[Row], half: Half | None = None) -> dict[str, Line]:
    """A line for each model, in the order of first sight; of one half of every set, or of all."""
    by_model: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kept = by_model[row.model]
        if half is None or row.half == half:
            kept.append(row)
    return {model: line(model, kept) for model, kept in by_model.items()}


def by_category(rows: Iterable[Row], key: str = "category") -> dict[str, dict[str, Line]]:
    """Lines of each model by category (HEx-PHI's, XSTest's types, MMLU's subjects)."""
    groups: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row.model][str(getattr(row, key))].append(row)
    return {model: {name: line(name, kept) for name, kept in parts.items()} for model, parts in groups.items()}


def columns(found: Iterable[Line]) -> list[str]:
    """The measures that any of the lines has."""
    seen = list(found)
    return [name for name in (*SHARES, *MEANS) if any(one[name] is not None for one in seen)]


def table(found: Mapping[str, Line], names: Sequence[str] | None = None) -> str:
    """Markdown: one model a row, every measure with its interval, shares in percent; the answers that lack a score are
    counted where there are any.
    """
    names = names or columns(found.values())
    lacking = ["unscored"] if any(one.unscored for one in found.values()) else []
    out = [f"| model | {' | '.join([*names, *lacking])} |", "| --- " * (len(names) + len(lacking) + 1) + "|"]
    for one in found.values():
        cells = ["" if one[name] is None else str(one[name]) for name in names]
        cells += [str(one.unscored)] if lacking else []
        out.append(f"| `{one.model}` | {' | '.join(cells)} |")
    return "\n".join(out)


def write(folder: Path, answers: Answers) -> None:
    """`results.json` and `results.csv` (one model a row) into `folder`."""
    found = lines(answers.rows)
    categories = {m: {n: one.to_json() for n, one in parts.items()} for m, parts in by_category(answers.rows).items()}
    body = {
        "models": [one.to_json() for one in found.values()],
        "categories": categories,
        "missing": [list(one) for one in answers.missing],
    }
    (folder / "results.json").write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    names = columns(found.values())
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["model", *(f"{name}{part}" for name in names for part in ("", "_low", "_high"))])
        for one in found.values():
            cells: list[Any] = [one.model]
            for name in names:
                taken = one[name]
                cells += ["", "", ""] if taken is None else [taken.value, taken.low, taken.high]
            out.writerow(cells)


def write_answers(folder: Path, answers: Answers) -> None:
    """`answers.jsonl`: every prompt and answer with its scores, to read; not to be passed around."""
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        for row in answers.rows:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
