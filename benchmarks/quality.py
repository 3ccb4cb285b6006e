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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, shown
from eval_clients.endpoint import Endpoint, EndpointError
from eval_clients.results import SHARES, Line, lines, read, table
from eval_clients.running import Running, ready, run
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


def rendered(rows: list[dict[str, Any]]) -> str:
    """The recorded lines as a markdown table, one model a row."""
    out = [f"| model | {' | '.join(name.strip() for name in COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        cells = [shown(row[key]) for key in COLUMNS.values()]
        out.append(f"| `{row['model']}` | {' | '.join(cells)} |")
    return "\n".join(out)


def measured(endpoint: Endpoint, models: list[str], folder: Path) -> dict[str, Line]:
    """All lines; EndpointError when an answer is missing: an unanswered row is no zero."""
    job = folder / "orders.jsonl"
    job.write_text(
        "".join(json.dumps(asdict(row)) + "\n" for row in draw_orders(ORDERS, split="heldout")), encoding="utf-8"
    )
    ready(folder, resume=False)
    todo = [tasks.job(str(job)), tasks.harmful_csv(SAFETY), tasks.harmless(SAFETY)]
    run(todo, endpoint, models, folder, Running(display="plain"))
    answers = read(folder)
    if answers.missing:
        raise EndpointError("; ".join(" ".join(one) for one in answers.missing))
    found = lines(answers.rows)
    return {model: found[model] for model in models}


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
            found = measured(endpoint, models, Path(folder))
    except EndpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    made = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "command": "python -m benchmarks.quality"}
    args.json.write_text(json.dumps({**made, "models": [one.to_json() for one in found.values()]}, indent=1) + "\n")
    print(table(found, [name for name in SHARES if name in set(COLUMNS.values())]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
