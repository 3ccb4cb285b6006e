"""Which rows mention safety, by the words in their turns."""

import re

from training.rows.chats import Chat

WORDS = (
    "abuse", "addict", "assault", "attack", "bomb", "bully", "cheat", "child safety", "crime", "criminal", "cyber",
    "danger", "dangerous", "discriminat", "drug", "exploit", "explosive", "extremis", "fraud", "gambl", "gun",
    "hack", "harass", "harm", "harmful", "hate speech", "hatred", "illegal", "insult", "kill", "malware", "murder",
    "offensive", "overdose", "phish", "poison", "privacy", "racis", "ransom", "safety", "scam", "self-harm", "sexis",
    "sexual", "shoot", "spyware", "stalk", "steal", "suicid", "terroris", "theft", "threat", "torture", "traffick",
    "unethical", "unsafe", "violen", "virus", "weapon",
)  # fmt: skip
"""Word prefixes, matched regardless of case."""

_PATTERN = re.compile(rf"\b(?:{'|'.join(map(re.escape, WORDS))})", re.IGNORECASE)


def mentions_safety(chat: Chat) -> bool:
    """Whether a word in any of its turns begins with one of WORDS."""
    return any(_PATTERN.search(content) for _, content in chat.messages)
