"""Words that tell rows which speak of safety from those which do not."""

from __future__ import annotations

import re

from training.rows.readers import Chat

WORDS = (
    "abuse", "addict", "assault", "attack", "bomb", "bully", "cheat", "child safety", "crime", "criminal", "cyber",
    "danger", "dangerous", "discriminat", "drug", "exploit", "explosive", "extremis", "fraud", "gambl", "gun",
    "hack", "harass", "harm", "harmful", "hate speech", "hatred", "illegal", "insult", "kill", "malware", "murder",
    "offensive", "overdose", "phish", "poison", "privacy", "racis", "ransom", "safety", "scam", "self-harm", "sexis",
    "sexual", "shoot", "spyware", "stalk", "steal", "suicid", "terroris", "theft", "threat", "torture", "traffick",
    "unethical", "unsafe", "violen", "virus", "weapon",
)  # fmt: skip
"""Beginnings of words."""

_PATTERN = re.compile(rf"\b(?:{'|'.join(map(re.escape, WORDS))})", re.IGNORECASE)


def speaks_of_safety(chat: Chat) -> bool:
    """Whether any of its turns holds a word that begins as one of WORDS."""
    return any(_PATTERN.search(content) for _, content in chat.messages)
