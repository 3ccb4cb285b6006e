"""Bring old results to the rules of today: a rule that is mended must not be mixed with answers scored by the old one.

A results folder keeps which rules its answers were scored by, and is not gone on with by others. `rescore` asks
nothing: the answers are in the logs. Verdicts of a judge and exact matches stay as they are.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from inspect_ai.log import EvalSample, list_eval_logs, read_eval_log, recompute_metrics, write_eval_log

from eval_clients.results import UNREAD, read, write, write_answers
from eval_clients.running import RULES, SETTINGS, FolderError
from eval_clients.scorers import shares, three_shares

NAME = three_shares.__name__


def _changes(samples: Sequence[EvalSample]) -> tuple[int, int]:
    """Scores the samples by the rules of today; how many scores and how many verdicts are others now."""
    scores = verdicts = 0
    for one in samples:
        score = (one.scores or {}).get(NAME)
        if score is None or not isinstance(score.value, dict):
            continue  # another task's, or unscored
        prompt = one.input if isinstance(one.input, str) else one.input[-1].text
        reference = one.target if isinstance(one.target, str) else one.target[0]
        verdict, value = shares(prompt, one.output.completion, reference if one.metadata["measure"] == "safe" else "")
        if value != score.value:
            scores, verdicts = scores + 1, verdicts + (verdict != score.explanation)
            score.value, score.explanation = dict(value), verdict
    return scores, verdicts


def rescore(folder: Path) -> int:
    """Scores all refused, answered and degenerate answers under `folder`/logs anew and writes the results' files; how
    many verdicts are others now. FolderError when there are no logs.
    """
    logs = list_eval_logs(str(folder / "logs")) if (folder / "logs").is_dir() else []
    if not logs:
        raise FolderError(f"{str(folder)!r} holds no results (no logs/*.eval)")
    changed = 0
    for info in logs:
        scores, verdicts = _changes(read_eval_log(info, exclude_fields=UNREAD).samples or [])
        if not scores:
            continue
        log = read_eval_log(info)  # whole, since it is written again
        _changes(log.samples or [])
        changed += verdicts
        recompute_metrics(log)
        write_eval_log(log, info)
    kept = folder / SETTINGS
    if kept.is_file():
        kept.write_text(json.dumps(json.loads(kept.read_text()) | {"rules": RULES}, indent=1, sort_keys=True) + "\n")
    answers = read(folder)
    write(folder, answers)
    write_answers(folder, answers)
    return changed
