"""The test that tells a broken endpoint from a weak model, on a small model of word pairs."""

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from eval_clients.endpoint import Endpoint
from eval_clients.errors import EndpointError
from eval_clients.tasks.logprobs import (
    SENTENCES,
    find_letter_tokens,
    letter_logprobs,
    logprob_faults,
    require_logprobs,
    top_logprobs,
)
from tests.eval_clients.faulty import Faulty, endpoint

NATURAL = {pair for text in SENTENCES for words in [text.split()] for pair in pairwise(words)}


@dataclass
class WordPairs:
    """Answers completions with log-probabilities of words given the word before; each flag breaks one thing."""

    deaf: bool = False
    constant: bool = False
    positive: bool = False
    gaps: bool = False
    other_text: bool = False
    next_differs: bool = False
    letters_split: bool = False
    silent: bool = False
    known: str = "ABCD"
    """Letters among the likeliest next tokens."""
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def logprob(self, before: str, word: str) -> float:
        if self.constant:
            return -1.0
        value = -1.0 if (before, word) in NATURAL and not self.other_text else -4.0 - len(word) / 10
        return value + (ord(word[0]) - 65) / 10 * (len(word) == 1) + (9.0 if self.positive else 0.0)

    def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        words = re.findall(r"\S+", body["prompt"])
        if not body.get("echo"):
            last = words[-1]
            top = {f" {x}": self.logprob(last, x) + (0.5 if self.next_differs else 0.0) for x in self.known}
            logprobs: dict[str, Any] | None = {"tokens": [" A"], "token_logprobs": [-1.0], "top_logprobs": [top]}
            return {"text": " A", "index": 0, "finish_reason": "length", "logprobs": None if self.silent else logprobs}
        tokens = [words[0], *(f" {word}" for word in words[1:])]
        values = [None, *(self.logprob(a, b) for a, b in pairwise(words))]
        if self.gaps:
            values[-1] = None
        if self.letters_split:
            tokens[-1] = tokens[-1] + "?"
        logprobs = {"tokens": [*tokens, " x"], "token_logprobs": [*values, -1.0]}
        text = "x" if self.deaf else body["prompt"] + " x"
        return {"text": text, "index": 0, "finish_reason": "length", "logprobs": logprobs}


@pytest.fixture
def model() -> Iterator[tuple[WordPairs, Endpoint]]:
    pairs = WordPairs()
    with endpoint(Faulty(lambda body: "", complete=pairs)) as served:
        yield pairs, Endpoint(served.url)


def test_a_weak_model_passes(model: tuple[WordPairs, Endpoint]) -> None:
    assert logprob_faults(model[1], "base") == []
    require_logprobs(model[1], "base")


@pytest.mark.parametrize(
    ("flag", "fault"),
    [
        ("deaf", "ignores `echo`"),
        ("constant", "all log-probabilities are the same"),
        ("positive", "must not be positive"),
        ("gaps", "leaves out log-probabilities of prompt tokens"),
        ("other_text", "no likelier than their words reversed"),
        ("next_differs", "next-token and echoed log-probabilities disagree"),
        ("letters_split", "has no token for 'A' after 'Answer:'"),
        ("silent", "returned no `logprobs`"),
    ],
)
def test_a_broken_endpoint_is_found_out(flag: str, fault: str, model: tuple[WordPairs, Endpoint]) -> None:
    pairs, where = model
    setattr(pairs, flag, True)
    faults = logprob_faults(where, "base")
    assert [sentence for sentence in faults if fault in sentence], faults
    with pytest.raises(EndpointError, match=r"mmlu needs echo and logprobs of http://127.0.0.1"):
        require_logprobs(where, "base")


def test_a_letter_missing_from_the_likeliest_tokens_is_asked_for_by_echo(model: tuple[WordPairs, Endpoint]) -> None:
    pairs, where = model

    async def ask() -> tuple[dict[str, float], dict[str, float]]:
        async with where.client() as client:
            tokens = await find_letter_tokens(client, "base", "ABCD")
            every = await letter_logprobs(client, "base", "Question? Answer:", tokens)
            pairs.known = "AB"
            pairs.bodies.clear()
            return every, await letter_logprobs(client, "base", "Question? Answer:", tokens)

    every, some = asyncio.run(ask())
    assert some == every
    assert sorted(body["prompt"][-2:] for body in pairs.bodies if body.get("echo")) == [" C", " D"]


def test_more_alternatives_are_asked_for_than_an_endpoint_may_allow() -> None:
    """OpenAI's limit is five: an endpoint that refuses twenty is asked again."""
    asked: list[int] = []

    def complete(body: dict[str, Any]) -> dict[str, Any]:
        asked.append(body["logprobs"])
        return WordPairs()(body)

    rules = Faulty(lambda body: "", complete=complete)
    rules.refuse = lambda body: "logprobs must be at most 5" if body.get("logprobs", 0) > 5 else ""
    with endpoint(rules) as served:

        async def ask() -> int:
            async with Endpoint(served.url).client() as client:
                return len(await top_logprobs(client, "base", "Question? Answer:"))

        assert asyncio.run(ask()) == 4
    assert asked == [5]
