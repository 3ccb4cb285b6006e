"""The safety set: harmful requests with kind refusals, and look-alike harmless ones with answers.

    python -m training.builtin.safety    # regenerate data/safety.jsonl and data/safety_heldout.jsonl

All wording is our own: topics and whole prompts (questions with who, where, why and should; feelings, small talk,
small jobs on a text) in `data/safety_topics.jsonl`, templates and refusals in `data/safety_phrases.json`. The same
templates and the same alarming words ask for harmful and harmless things, so only the meaning tells them apart. Many
topics with few rows each teach more than few topics in many templates, and more rows teach more than fewer. Harmful
requests are general and hold no detail; their only answers are refusals. The held-out file shares no topic and no
template with the training file.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]
Kind = Literal["harmful", "harmless"]

DATA = Path(__file__).parent / "data"
FILES: Mapping[Split, Path] = {"train": DATA / "safety.jsonl", "heldout": DATA / "safety_heldout.jsonl"}


@dataclass(frozen=True, slots=True)
class SafetyRow:
    """One request, the answer to learn (or, held out, to compare with), and its origin."""

    prompt: str
    answer: str
    kind: Kind
    topic: str
    template: str
    """The sentence template, or "" for a prompt written by hand as a whole."""


@dataclass(frozen=True, slots=True)
class Phrases:
    """What rows are composed of besides the topics."""

    templates: Mapping[Split, Sequence[str]]
    """How-to questions with a {topic}."""
    rows_per_topic: Mapping[Split, Mapping[Kind, int]]
    refusals: Sequence[str]
    closers: Mapping[str, Sequence[str]]
    """Second sentences of refusals, by category of harm."""
    answer_opening: str
    """Begins every answer, as all refusals begin alike: whether to answer is then one choice between two tokens."""
    statement_openings: Sequence[str]
    """A prompt that begins so and asks nothing is answered without `answer_opening`."""
    office_rows: int
    office_words: Mapping[str, Sequence[str]]
    """Words of everyday office notes; none is in a topic or in the orders of the task set."""
    office_notes: Sequence[str]
    office_jobs: Sequence[Mapping[Literal["job", "answer"], str]]
    """Small jobs on a text: a safety adapter that saw only questions refuses every pasted text."""


@cache
def read_phrases() -> Phrases:
    """`data/safety_phrases.json`, read on first use."""
    return Phrases(**json.loads((DATA / "safety_phrases.json").read_text(encoding="utf-8")))


def read_rows(split: Split) -> list[SafetyRow]:
    """The committed rows of one split."""
    return [SafetyRow(**json.loads(line)) for line in FILES[split].read_text(encoding="utf-8").splitlines()]


def generate_rows(split: Split, *, seed: int = 0) -> list[SafetyRow]:
    """All rows of one split, shuffled; the same seed gives the same rows."""
    phrases = read_phrases()
    rng = random.Random(f"safety:{split}:{seed}")
    rows: list[SafetyRow] = []
    for line in (DATA / "safety_topics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["split"] != split:
            continue
        kind: Kind = entry["kind"]
        templates: Sequence[str] = [""]
        if "topic" in entry:
            templates = rng.sample(phrases.templates[split], phrases.rows_per_topic[split][kind])
        for template in templates:
            answer = entry.get("answer") or _compose_refusal(entry["category"], rng)
            topic = entry.get("topic") or entry["prompt"]
            prompt = template.format(topic=topic) if template else entry["prompt"]
            asks = template or "?" in prompt or not prompt.startswith(tuple(phrases.statement_openings))
            if kind == "harmless" and asks:
                answer = f"{phrases.answer_opening} {answer}"
            rows.append(SafetyRow(prompt, answer, kind, topic, template))
    if split == "train":
        rows += _compose_office_rows(rng, phrases)
    rng.shuffle(rows)
    return rows


def _compose_office_rows(rng: random.Random, phrases: Phrases) -> list[SafetyRow]:
    """Everyday jobs on a pasted office note, with their answers."""
    rows = []
    for index in range(phrases.office_rows):
        words = {key: rng.choice(choices) for key, choices in phrases.office_words.items()}
        task = phrases.office_jobs[index % len(phrases.office_jobs)]
        prompt = f"{task['job']}\n\n{rng.choice(phrases.office_notes).format(**words)}"
        rows.append(SafetyRow(prompt, task["answer"].format(**words), "harmless", words["event"], ""))
    return rows


def _compose_refusal(category: str, rng: random.Random) -> str:
    """A brief, kind refusal; a third are one sentence, but never on self-harm."""
    phrases = read_phrases()
    refusal = rng.choice(phrases.refusals)
    if category != "self" and rng.random() < 1 / 3:
        return refusal
    return f"{refusal} {rng.choice(phrases.closers[category])}"


def main() -> None:
    """Write both files and print their sizes."""
    for split, path in FILES.items():
        rows = generate_rows(split)
        path.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        harmful = sum(row.kind == "harmful" for row in rows)
        print(f"{path.name}: {harmful} harmful, {len(rows) - harmful} harmless")


if __name__ == "__main__":
    main()
