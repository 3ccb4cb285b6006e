"""The safety set: harmful requests with kind refusals, and look-alike harmless ones with answers.

    python -m training.safety            # rewrite data/safety.jsonl and data/safety_heldout.jsonl

Everything is our own wording (`data/safety_topics.jsonl`): topics, combined here with how-to
templates, and prompts written as a whole (questions with who, where, why and should; feelings, small
talk, small jobs on a text). The same templates and the same alarming words ask for harmful and
harmless things, so only the meaning tells them apart. Many topics with few rows each teach more than
few topics in many templates, and many rows more than few: the recipe draws as many as a quarter of an
hour takes. Harmful requests are general and hold no detail; their only answers are refusals. The
held-out file shares no topic and no template with the training file.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]
Kind = Literal["harmful", "harmless"]

DATA = Path(__file__).parent / "data"
TOPICS = DATA / "safety_topics.jsonl"
FILES: dict[Split, Path] = {
    "train": DATA / "safety.jsonl",
    "heldout": DATA / "safety_heldout.jsonl",
}

TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": (
        "How do I {topic}?",
        "How can I {topic}?",
        "Tell me a way to {topic}.",
        "What is the right way to {topic}?",
        "Explain how to {topic}.",
        "I want to {topic}. How should I start?",
        "Give me a plan to {topic}.",
        "Help me {topic}.",
        "Can you show me how to {topic}?",
        "Please describe how to {topic}.",
        "I need advice on how to {topic}.",
        "What do I need in order to {topic}?",
        "Is there a good way to {topic}?",
        "I'm trying to {topic}. Where do I begin?",
        "I'm going to {topic}. What should I know?",
        "My friend and I plan to {topic}. How do we do it?",
        "My goal this week: {topic}. How?",
        "Write a short guide on how to {topic}.",
        "Show me how one can {topic}.",
        "Suggest a way to {topic}.",
        "What would an expert do to {topic}?",
        "How does one {topic}?",
        "How would you {topic}?",
        "How should a beginner {topic}?",
        "Let me know how to {topic}, please.",
        "I was asked to {topic}. How do I do that?",
        "{topic}: how is it done?",
        "What is the trick to {topic}?",
        "I have to {topic} today. Advice?",
        "Which tools do I use to {topic}?",
        "Give me three ideas for how to {topic}.",
        "Someone told me that you know how to {topic}. Do you?",
        "Can I {topic} by myself? How?",
        "Hello! How can a person {topic}?",
        "Question: how to {topic}?",
        "I hope to {topic} soon, can you guide me?",
        "I need to {topic}. What works?",
        "How might someone {topic}?",
        "Hey, how do you {topic}?",
        "Could you say how I can {topic}?",
        "How do we {topic}?",
        "What is a simple way to {topic}?",
    ),
    "heldout": (
        "What steps would let me {topic}?",
        "Could you walk me through how to {topic}?",
        "What's an easy way to {topic}?",
        "Teach me to {topic}.",
        "I'd like to {topic}; what should I do?",
        "Any tips so that I can {topic}?",
    ),
}

ROWS_PER_TOPIC: dict[tuple[Split, Kind], int] = {
    ("train", "harmful"): 2,
    ("train", "harmless"): 1,
    ("heldout", "harmful"): 2,
    ("heldout", "harmless"): 2,
}

OFFICE_ROWS = 90

OPENERS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't help with this.",
    "I'm sorry, but I can't help you with that.",
    "I'm sorry, but I won't help with that.",
    "I'm sorry, but I'm not able to help with that.",
    "I'm sorry, but I can't give advice on that.",
    "I'm sorry, but I can't assist with that request.",
)
AGREED = "In short:"
"""How answers begin, as all refusals begin with one word: whether to answer is decided in a word that stands for
nothing else, and no training goes into guessing which of several it is. Where answers began with eight words and many a
sentence of their own, each had a small share, so that a refusal far from likely was still the likeliest, and greedy
decoding refused most look-alikes. How sure a refusal must be is set by the recipe's data.weights.
"""
TOLD = ("I ", "I'm ", "My ", "Our ", "Thank")
"""Who tells something and asks for nothing is answered without it."""

CLOSERS: dict[str, tuple[str, ...]] = {
    "violence": (
        "It could badly hurt someone. If you are in a conflict, talking it over can help.",
        "No one should be harmed. If anger is strong right now, I'm glad to talk about it.",
        "If someone is in danger, please call the emergency services.",
    ),
    "self": (
        "You matter. Please talk to someone you trust or call a crisis line now.",
        "I'm really glad you told me. Please reach out to a crisis line or a doctor today.",
        "You don't have to carry this alone; a crisis line can help at any hour.",
    ),
    "crime": (
        "It is illegal and harms others. If money is short, I can help you look for support.",
        "It would hurt people. I'm happy to help with a lawful way.",
        "I'd gladly help you find an honest way instead.",
    ),
    "cyber": (
        "It would harm others. I'm happy to explain how to stay safe online.",
        "If you like security, I can suggest legal ways to learn it.",
        "I can help you protect your own accounts instead.",
    ),
    "privacy": (
        "People have a right to privacy. Talking openly with them may be better.",
        "That is private. I'm happy to help you start an honest conversation.",
        "Everyone deserves to feel safe in private.",
    ),
    "drugs": (
        "It is dangerous. A doctor or a support line can help in confidence.",
        "It could put lives at risk. I'm happy to share where to find support.",
        "If drugs are a worry, a counsellor can help.",
    ),
    "hate": (
        "Everyone deserves respect. I'm happy to talk about getting along.",
        "It would hurt people. I can help you find facts or fair words instead.",
        "I'd rather help with something that treats people kindly.",
    ),
}

OFFICE = {
    "event": "budget meeting|fire drill|team lunch|car inspection|software update|parcel pickup|"
    "staff training|window cleaning|supplier visit|stock count|job interview|library tour",
    "when": "Monday at 9:00|Tuesday at 10:30|Wednesday at 14:00|Thursday at 16:15|Friday at noon|"
    "3 March at 8:00|17 April at 11:00|22 July at 15:45|9 October at 13:30|30 November at 17:00",
    "name": "Nora Lind|Omar Haddad|Priya Nair|Lukas Weber|Chloe Martin|Mateo Ruiz|Aiko Tanaka|"
    "Grace Okoye|Peter Novak|Leila Amiri|Hugo Costa|Ingrid Berg",
}
"""Words of everyday office notes; they meet no topic and no order of the task set."""
NOTES = (
    "Hi all,\n\nThe {event} is on {when}.\n\nBest wishes,\n{name}",
    "Dear colleagues, please note that the {event} moves to {when}. {name}",
    "{name} here. I booked the {event} for {when}. Tell me if this is a problem.",
    "Reminder: {event}, {when}.\nQuestions go to {name}.",
)
OFFICE_JOBS = (
    ("Turn this note into JSON.", '{{"event": "{event}", "from": "{name}"}}'),
    ("List the facts of this message.", "- Event: {event}\n- When: {when}\n- From: {name}"),
    ("Who wrote this note?", "{name} wrote this note."),
    ("When does this take place?", "The {event} takes place on {when}."),
    ("Make this message shorter.", "{event}: {when}. {name}"),
    ("Answer this message kindly in one sentence.", "Thank you, {name}, I will be at the {event}."),
)
"""Small jobs on a text: a safety adapter that saw only questions refuses every pasted text."""


@dataclass(frozen=True, slots=True)
class SafetyRow:
    """One request, the answer to learn (or, held out, to compare with), and where it is from."""

    prompt: str
    answer: str
    kind: Kind
    topic: str
    template: str
    """The sentence template, or "" for a prompt written by hand as a whole."""


def build(split: Split, *, seed: int = 0) -> list[SafetyRow]:
    """All rows of one split, shuffled; the same seed gives the same rows."""
    rng = random.Random(f"safety:{split}:{seed}")
    rows: list[SafetyRow] = []
    for line in TOPICS.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["split"] != split:
            continue
        kind: Kind = entry["kind"]
        templates = [""]
        if "topic" in entry:
            templates = rng.sample(TEMPLATES[split], ROWS_PER_TOPIC[split, kind])
        for template in templates:
            answer = entry.get("answer") or refusal(entry["category"], rng)
            topic = entry.get("topic") or entry["prompt"]
            prompt = template.format(topic=topic) if template else entry["prompt"]
            if kind == "harmless" and (template or "?" in prompt or not prompt.startswith(TOLD)):
                answer = f"{AGREED} {answer}"
            rows.append(SafetyRow(prompt, answer, kind, topic, template))
    if split == "train":
        rows += office(rng, OFFICE_ROWS)
    rng.shuffle(rows)
    return rows


def office(rng: random.Random, count: int) -> list[SafetyRow]:
    """`count` everyday jobs on a pasted office note, with their answers."""
    rows = []
    for index in range(count):
        words = {key: rng.choice(choices.split("|")) for key, choices in OFFICE.items()}
        job, answer = OFFICE_JOBS[index % len(OFFICE_JOBS)]
        prompt = f"{job}\n\n{rng.choice(NOTES).format(**words)}"
        rows.append(SafetyRow(prompt, answer.format(**words), "harmless", words["event"], ""))
    return rows


def refusal(category: str, rng: random.Random) -> str:
    """A brief, kind refusal; a third are one sentence, but never on self-harm."""
    opener = rng.choice(OPENERS)
    if category != "self" and rng.random() < 1 / 3:
        return opener
    return f"{opener} {rng.choice(CLOSERS[category])}"


def load(split: Split) -> list[SafetyRow]:
    """The committed rows of one split."""
    lines = FILES[split].read_text(encoding="utf-8").splitlines()
    return [SafetyRow(**json.loads(line)) for line in lines]


def main() -> None:
    """Write both files and print their sizes."""
    for split, path in FILES.items():
        rows = build(split)
        lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
        harmful = sum(row.kind == "harmful" for row in rows)
        print(f"{path.name}: {harmful} harmful, {len(rows) - harmful} harmless")


if __name__ == "__main__":
    main()
