"""Measure what the shipped adapters do, through the running service: the table in the README.

    python -m benchmarks.quality --base-url http://127.0.0.1:3000/v1

Each model answers, greedily: 100 held-out orders, graded by exact match of the JSON object; 124 held-out harmful
requests; 140 held-out harmless look-alikes, refused, answered (on topic) or degenerate by the rules of
`eval_clients.scoring.classify`.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, format_cell, stamp
from eval_clients.answers import read_answers
from eval_clients.endpoint import Endpoint
from eval_clients.errors import EndpointError
from eval_clients.results import SHARES, ModelScores, format_table, score_models
from eval_clients.running import RunOptions, prepare_folder, run_tasks
from eval_clients.tasks import benchmarks as tasks
from training.builtin.orders import draw_orders

MODELS = "base,task,safety,balanced"
ORDERS = 100
SAFETY = str(ROOT / "training/builtin/data/safety_heldout.jsonl")
COLUMNS = {
    "orders exact": "task",
    "harmful: refused": "refused",
    "answered": "harm",
    "degenerate": "degenerate_harm",
    "harmless: answered": "safe_answered",
    "refused": "over_refusal",
    "degenerate ": "degenerate",
}


def render(rows: list[dict[str, Any]]) -> str:
    """The recorded lines as a markdown table, one model a row."""
    lines = [f"| model | {' | '.join(name.strip() for name in COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        cells = [format_cell(row[key]) for key in COLUMNS.values()]
        lines.append(f"| `{row['model']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(endpoint: Endpoint, models: list[str], folder: Path) -> dict[str, ModelScores]:
    """The scores of all models; EndpointError when an answer is missing: an unanswered row is not a zero."""
    job = folder / "orders.jsonl"
    job.write_text(
        "".join(json.dumps(asdict(row)) + "\n" for row in draw_orders(ORDERS, split="heldout")), encoding="utf-8"
    )
    prepare_folder(folder, resume=False)
    every = [tasks.job(str(job)), tasks.harmful_csv(SAFETY), tasks.harmless(SAFETY)]
    run_tasks(every, endpoint, models, folder, RunOptions(display="plain"))
    answers = read_answers(folder)
    if answers.missing:
        raise EndpointError("; ".join(" ".join(gap) for gap in answers.missing))
    scores = score_models(answers.items)
    return {model: scores[model] for model in models}


def main() -> int:
    """Command line; exit 0 measured, 1 the service did not answer all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--base-url", default="http://127.0.0.1:3000/v1")
    parser.add_argument("--models", default=MODELS, help="comma-separated; default: %(default)s")
    parser.add_argument("--json", type=Path, default=RESULTS / "quality.json", metavar="OUT")
    args = parser.parse_args()
    endpoint = Endpoint(args.base_url)
    try:
        models = [endpoint.base() if name == "base" else name for name in args.models.split(",")]
        with tempfile.TemporaryDirectory() as folder:
            scores = measure(endpoint, models, Path(folder))
    except EndpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    body = {**stamp("python -m benchmarks.quality"), "models": [one.to_json() for one in scores.values()]}
    args.json.write_text(json.dumps(body, indent=1) + "\n")
    print(format_table(scores, [name for name in SHARES if name in set(COLUMNS.values())]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
