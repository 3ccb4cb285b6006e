"""Measure what the adapters do, through the running service: the table in the README.

    python -m benchmarks.quality --base-url http://127.0.0.1:3000/v1 --json OUT.json

Each model answers, greedily and 16 requests at a time: 100 held-out orders, graded by exact match
of the JSON object; 124 held-out harmful requests; 140 held-out harmless look-alikes. Answers are
refused, answered (on topic) or degenerate by the rules of `training.verdict`. Intervals are
Wilson's at 95 %. A request that fails stops the run: an unanswered row is no zero.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from openai import APIConnectionError, APIStatusError, AsyncOpenAI

from training.orders import OrderRow, grade, orders
from training.safety import SafetyRow, load
from training.verdict import Verdict, classify

MODELS = "base,task,safety,balanced"
BASE_ALIAS = "base"
"""On the command line, `base` is the first model the server lists."""
ORDERS = 100
CONCURRENCY = 16
ANSWER_TOKENS = 64
ORDER_TOKENS = 96
"""A right answer with three items has up to 85 tokens."""
Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Share:
    """``hits`` of ``total``, with Wilson's 95 % interval."""

    hits: int
    total: int
    low: float
    high: float

    @staticmethod
    def of(hits: int, total: int) -> Share:
        """Wilson score interval; both ends lie in [0, 1]."""
        if total < 1 or not 0 <= hits <= total:
            raise ValueError(f"{hits} of {total} is no share")
        p, z2 = hits / total, Z95 * Z95
        centre = (p + z2 / (2 * total)) / (1 + z2 / total)
        half = Z95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total)) / (1 + z2 / total)
        return Share(hits, total, max(0.0, centre - half), min(1.0, centre + half))

    def __str__(self) -> str:
        value, low, high = (round(100 * x) for x in (self.hits / self.total, self.low, self.high))
        return f"{value} % ({low}–{high})"


@dataclass(frozen=True, slots=True)
class Score:
    """One model's row of the table."""

    model: str
    exact: Share
    harmful: dict[Verdict, Share]
    harmless: dict[Verdict, Share]
    seconds: float


async def ask(client: AsyncOpenAI, model: str, prompts: Sequence[str], tokens: int) -> list[str]:
    """Answers in the order of the prompts; at most CONCURRENCY requests are under way."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(prompt: str) -> str:
        async with gate:
            reply = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=tokens,
            )
        return reply.choices[0].message.content or ""

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def verdicts(rows: Sequence[SafetyRow], answers: Sequence[str]) -> dict[Verdict, Share]:
    """The share of each verdict; a refusal's reference is no topic, so only answers lend theirs."""
    counts = Counter(
        classify(row.prompt, answer, row.answer if row.kind == "harmless" else "")
        for row, answer in zip(rows, answers, strict=True)
    )
    kinds: tuple[Verdict, ...] = ("refused", "answered", "degenerate")
    return {kind: Share.of(counts[kind], len(rows)) for kind in kinds}


async def measure(
    client: AsyncOpenAI, model: str, todo: Sequence[OrderRow], safety: Sequence[SafetyRow]
) -> tuple[Score, list[dict[str, str]]]:
    """All answers of one model, graded; also the answers themselves."""
    began = time.monotonic()
    filled = await ask(client, model, [row.prompt for row in todo], ORDER_TOKENS)
    harmful = [row for row in safety if row.kind == "harmful"]
    harmless = [row for row in safety if row.kind == "harmless"]
    no = await ask(client, model, [row.prompt for row in harmful], ANSWER_TOKENS)
    yes = await ask(client, model, [row.prompt for row in harmless], ANSWER_TOKENS)
    right = sum(grade(answer, row) for answer, row in zip(filled, todo, strict=True))
    score = Score(
        model,
        Share.of(right, len(todo)),
        verdicts(harmful, no),
        verdicts(harmless, yes),
        time.monotonic() - began,
    )
    prompts = [row.prompt for row in todo] + [row.prompt for row in harmful + harmless]
    said = [{"prompt": p, "answer": a} for p, a in zip(prompts, filled + no + yes, strict=True)]
    return score, said


def table(scores: Sequence[Score]) -> str:
    """The scores as a markdown table, one model a row."""
    lines = [
        "| model | orders exact | harmful: refused | answered | degenerate "
        "| harmless: answered | refused | degenerate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for score in scores:
        bad, good = score.harmful, score.harmless
        cells = [score.exact, bad["refused"], bad["answered"], bad["degenerate"]]
        cells += [good["answered"], good["refused"], good["degenerate"]]
        lines.append(" | ".join([f"| `{score.model}`", *map(str, cells)]) + " |")
    return "\n".join(lines)


async def run(base_url: str, models: Sequence[str], out: Path | None, said: Path | None) -> None:
    """Measure every model in turn, print the table, write the scores to `out`, the answers to `said`."""
    todo, safety = orders(ORDERS, split="heldout"), load("heldout")
    scores: list[Score] = []
    answers: dict[str, list[dict[str, str]]] = {}
    async with AsyncOpenAI(base_url=base_url, api_key="none", timeout=600) as client:
        served = [model.id async for model in client.models.list()]
        for asked in models:
            model = served[0] if asked == BASE_ALIAS else asked
            score, answers[model] = await measure(client, model, todo, safety)
            scores.append(score)
            print(f"{model}: {score.seconds:.0f} s", file=sys.stderr, flush=True)
    print(table(scores))
    if out:
        made = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "command": "python -m benchmarks.quality"}
        out.write_text(json.dumps({**made, "scores": [asdict(score) for score in scores]}, indent=1) + "\n")
    if said:
        said.write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    """Command line; exit 0 measured, 1 the service did not answer."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--base-url", default="http://127.0.0.1:3000/v1")
    parser.add_argument("--models", default=MODELS, help="comma-separated; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="OUT", help="scores")
    parser.add_argument("--answers", type=Path, metavar="OUT", help="all answers, to read; not to be published")
    args = parser.parse_args()
    try:
        asyncio.run(run(args.base_url, args.models.split(","), args.json, args.answers))
    except APIConnectionError:
        print(f"no service at {args.base_url!r}; start it with: make serve", file=sys.stderr)
        return 1
    except APIStatusError as error:
        print(f"the service answered {error.status_code}: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
