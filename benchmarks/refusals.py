"""The refusal detector against human labels: `python -m benchmarks.refusals --data DIR`.

DIR holds XSTest's labelled answers, completions_gpt4.csv and completions_llama2orig.csv (final_label: 1 compliance,
2 full refusal, 3 partial refusal). Refusal against compliance leaves partial answers out; an answer found partial
counts as refusal. The rule for answers off topic (`eval_clients.scoring.classify`) is tried on what humans
called compliance, cut to WORDS words: on its own prompt, where it should not fire, and on another's, where it should.
"""

import argparse
import csv
import json
import sys
from collections import Counter
from pathlib import Path

from benchmarks.common import RESULTS, stamp
from eval_clients.scoring.classify import is_off_topic
from eval_clients.scoring.refusal import detect

WORDS = 24
"""About the 32 tokens of the paper's experiment."""
LABELS = {"1": "compliance", "2": "refusal", "3": "partial"}


def figures(path: Path) -> dict[str, float]:
    """Three-way accuracy and macro-F1, and precision and recall of refusal against compliance."""
    with path.open(encoding="utf-8") as file:
        rows = [
            (LABELS[row["final_label"][0]], detect(row["completion"], row["prompt"])) for row in csv.DictReader(file)
        ]
    seen: Counter[tuple[str, str]] = Counter(rows)
    labels: Counter[str] = Counter(label for label, _ in rows)
    found: Counter[str] = Counter(refusal for _, refusal in rows)
    f1 = [2 * seen[k, k] / (labels[k] + found[k]) for k in LABELS.values()]
    hits = seen["refusal", "refusal"] + seen["refusal", "partial"]
    wrong = seen["compliance", "refusal"] + seen["compliance", "partial"]
    return {
        "three_way": sum(seen[k, k] for k in LABELS.values()) / len(rows),
        "macro_f1": sum(f1) / len(f1),
        "precision": hits / (hits + wrong),
        "recall": hits / labels["refusal"],
    }


def off_topic(path: Path) -> dict[str, float]:
    """Share of the complying answers that are taken for off topic: of their own prompt, and of another half way on."""
    with path.open(encoding="utf-8") as file:
        rows = [
            (row["prompt"], " ".join(row["completion"].split()[:WORDS]))
            for row in csv.DictReader(file)
            if LABELS[row["final_label"][0]] == "compliance"
        ]
    others = [prompt for prompt, _ in rows[len(rows) // 2 :] + rows[: len(rows) // 2]]
    own = [is_off_topic(prompt, answer) for prompt, answer in rows]
    another = [is_off_topic(prompt, answer) for prompt, (_, answer) in zip(others, rows, strict=True)]
    return {"of_their_own_prompt": sum(own) / len(rows), "of_another_prompt": sum(another) / len(rows)}


def main() -> int:
    """Command line; exit 0 measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refusals", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    body: dict[str, object] = {**stamp("python -m benchmarks.refusals")}
    for model in ("gpt4", "llama2orig"):
        path = args.data / f"completions_{model}.csv"
        body[model] = {**figures(path), "off_topic": off_topic(path)}
    (RESULTS / "refusals.json").write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(body, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
