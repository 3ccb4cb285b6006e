"""Log-probabilities of letters through `/v1/completions`, and a test that tells a broken endpoint from a dumb model."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any

from openai import APIConnectionError, APIStatusError, AsyncOpenAI, BadRequestError

from eval_clients.endpoint import EndpointError

LetterForms = Mapping[str, str]
"""Letter to the token that the served tokenizer makes of it after `Answer:`."""
TOP = (20, 5)
"""Alternatives asked for at each position: vLLM's most, then OpenAI's."""
TOLERANCE = 0.02
"""Nats by which the same log-probability may differ between two ways of asking (bfloat16 servers)."""


async def echoed(client: AsyncOpenAI, model: str, text: str) -> tuple[list[str], list[float | None]]:
    """Tokens and log-probabilities of `text` itself; EndpointError where `echo` or `logprobs` are not honoured."""
    answer = await client.completions.create(
        model=model, prompt=text, max_tokens=1, temperature=0, echo=True, logprobs=1
    )
    choice = answer.choices[0]
    if not choice.text.startswith(text[: len(text) - 1].rstrip()):
        raise EndpointError(f"the endpoint ignores `echo`: the answer for {model!r} does not begin with the prompt")
    found = choice.logprobs
    if found is None or not found.tokens or not found.token_logprobs:
        raise EndpointError(f"the endpoint ignores `logprobs` together with `echo` for {model!r}")
    return list(found.tokens[:-1]), list(found.token_logprobs[:-1])


async def letter_forms(client: AsyncOpenAI, model: str, choices: str) -> LetterForms:
    """The token each letter has after `Answer:` (` A`, `A` or `▁A`); EndpointError when it is none of its own."""
    forms = {}
    for letter in choices:
        tokens, _ = await echoed(client, model, f"Answer: {letter}")
        if tokens[-1].strip(" ▁Ġ") != letter:
            raise EndpointError(f"{model!r} has no token of its own for {letter!r} after 'Answer:' but {tokens[-1]!r}")
        forms[letter] = tokens[-1]
    if len(set(forms.values())) < len(forms):
        raise EndpointError(f"{model!r} has the same token for two letters: {forms}")
    return forms


async def top(client: AsyncOpenAI, model: str, prompt: str) -> Mapping[str, float]:
    """The likeliest next tokens and their log-probabilities."""
    for count in TOP:
        try:
            answer = await client.completions.create(
                model=model, prompt=prompt, max_tokens=1, temperature=0, logprobs=count
            )
            break
        except BadRequestError as error:
            if "logprobs" not in str(error) or count == TOP[-1]:
                raise
    found = answer.choices[0].logprobs
    if found is None or not found.top_logprobs:
        raise EndpointError(f"the endpoint gives no `logprobs` for {model!r}")
    return dict(found.top_logprobs[0])


async def letters(client: AsyncOpenAI, model: str, prompt: str, forms: LetterForms) -> dict[str, float]:
    """Log-probability (nats) of each letter as the next token after `prompt`."""
    near = await top(client, model, prompt)
    missing = [letter for letter, token in forms.items() if token not in near]
    asked = await asyncio.gather(*(echoed(client, model, f"{prompt} {letter}") for letter in missing))
    last = {letter: logprobs[-1] for letter, (_, logprobs) in zip(missing, asked, strict=True)}
    found = {letter: near.get(token, last.get(letter)) for letter, token in forms.items()}
    return {letter: -math.inf if value is None else float(value) for letter, value in found.items()}


SENTENCES = (
    "The sun rises in the east and sets in the west.",
    "Water freezes at zero degrees and boils at one hundred degrees.",
    "Two plus two is four, and four plus four is eight.",
)


async def self_test(client: AsyncOpenAI, model: str, forms_of: str = "ABCD") -> list[str]:
    """What is broken in the endpoint's log-probabilities for `model`, one sentence each; empty when nothing is.

    A weak model passes: its numbers agree with one another and prefer English to the same words reversed. A broken
    endpoint does not: no echo, no numbers, positive or constant ones, or two ways of asking that disagree.
    """
    try:
        forms = await letter_forms(client, model, forms_of)
        faults = await _numbers(client, model, SENTENCES)
        faults += await _agreement(client, model, forms)
    except EndpointError as error:
        return [str(error)]
    except APIStatusError as error:
        return [f"/v1/completions with echo and logprobs answered {error.status_code}: {error.message}"]
    except APIConnectionError as error:
        return [f"/v1/completions gave no answer: {error}"]
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        return [f"/v1/completions answered with something that is no completion ({error})"]
    return faults


async def _numbers(client: AsyncOpenAI, model: str, sentences: Sequence[str]) -> list[str]:
    totals: list[tuple[float, float]] = []
    seen: list[float] = []
    for sentence in sentences:
        reverse = " ".join(reversed(sentence.split()))
        sums = []
        for text in (sentence, reverse):
            _, values = await echoed(client, model, text)
            numbers = [value for value in values[1:] if value is not None]
            if len(numbers) < len(values) - 1:
                return ["the endpoint leaves out log-probabilities of prompt tokens"]
            seen += numbers
            sums.append(math.fsum(numbers))
        totals.append((sums[0], sums[1]))
    faults = []
    if any(value > 1e-3 or math.isnan(value) for value in seen):
        faults.append(f"log-probabilities must not be positive, yet {max(seen)} was given")
    if max(seen) - min(seen) < 0.1:
        faults.append(f"all log-probabilities are the same ({seen[0]}): the endpoint makes them up")
    elif all(natural <= backwards for natural, backwards in totals):
        faults.append("sentences are no likelier than their words reversed: the numbers are not of these prompts")
    return faults


async def _agreement(client: AsyncOpenAI, model: str, forms: LetterForms) -> list[str]:
    text = "Question: which letter comes first in the alphabet?\nA. A\nB. B\nC. C\nD. D\nAnswer:"
    near = await top(client, model, text)
    differences: dict[str, Any] = {}
    for letter, token in forms.items():
        _, values = await echoed(client, model, f"{text} {letter}")
        if token in near and values[-1] is not None and abs(near[token] - values[-1]) > TOLERANCE:
            differences[letter] = (round(near[token], 3), round(values[-1], 3))
    if differences:
        return [f"next-token and echoed log-probabilities disagree (next, echoed): {differences}"]
    return []
