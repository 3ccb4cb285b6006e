"""Log-probabilities of letters through `/v1/completions`, and a test that tells a broken endpoint from a weak model."""

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from openai import APIConnectionError, APIStatusError, AsyncOpenAI, BadRequestError

from eval_clients.endpoint import Endpoint
from eval_clients.errors import EndpointError

LetterTokens = Mapping[str, str]
"""Letter to the token that the served tokenizer makes of it after `Answer:`."""
TOP = (20, 5)
"""Alternatives requested at each position: vLLM's maximum, then OpenAI's."""
TOLERANCE = 0.02
"""Nats by which the same log-probability may differ between two ways of asking (bfloat16 servers)."""


async def echo_logprobs(client: AsyncOpenAI, model: str, text: str) -> tuple[list[str], list[float | None]]:
    """Tokens of `text` and their log-probabilities (nats); EndpointError when `echo` or `logprobs` is ignored."""
    answer = await client.completions.create(
        model=model, prompt=text, max_tokens=1, temperature=0, echo=True, logprobs=1
    )
    choice = answer.choices[0]
    if not choice.text.startswith(text[: len(text) - 1].rstrip()):
        raise EndpointError(f"the endpoint ignores `echo`: the answer for {model!r} does not begin with the prompt")
    logprobs = choice.logprobs
    if logprobs is None or not logprobs.tokens or not logprobs.token_logprobs:
        raise EndpointError(f"the endpoint ignores `logprobs` together with `echo` for {model!r}")
    return list(logprobs.tokens[:-1]), list(logprobs.token_logprobs[:-1])


async def find_letter_tokens(client: AsyncOpenAI, model: str, choices: str) -> LetterTokens:
    """The token of each letter after `Answer:` (` A`, `A` or `▁A`); EndpointError when letters have no token each."""
    tokens_by_letter: dict[str, str] = {}
    for letter in choices:
        tokens, _ = await echo_logprobs(client, model, f"Answer: {letter}")
        if tokens[-1].strip(" ▁Ġ") != letter:
            raise EndpointError(f"{model!r} has no token for {letter!r} after 'Answer:', found {tokens[-1]!r}")
        tokens_by_letter[letter] = tokens[-1]
    if len(set(tokens_by_letter.values())) < len(tokens_by_letter):
        raise EndpointError(f"{model!r} has the same token for two letters: {tokens_by_letter}")
    return tokens_by_letter


async def top_logprobs(client: AsyncOpenAI, model: str, prompt: str) -> Mapping[str, float]:
    """The likeliest next tokens and their log-probabilities (nats)."""
    for count in TOP:
        try:
            answer = await client.completions.create(
                model=model, prompt=prompt, max_tokens=1, temperature=0, logprobs=count
            )
            break
        except BadRequestError as error:
            if "logprobs" not in str(error) or count == TOP[-1]:
                raise
    logprobs = answer.choices[0].logprobs
    if logprobs is None or not logprobs.top_logprobs:
        raise EndpointError(f"the endpoint returned no `logprobs` for {model!r}")
    return dict(logprobs.top_logprobs[0])


async def letter_logprobs(client: AsyncOpenAI, model: str, prompt: str, tokens: LetterTokens) -> dict[str, float]:
    """Log-probability (nats) of each letter as the next token after `prompt`."""
    top = await top_logprobs(client, model, prompt)
    missing = [letter for letter, token in tokens.items() if token not in top]
    echoes = await asyncio.gather(*(echo_logprobs(client, model, f"{prompt} {letter}") for letter in missing))
    last = {letter: logprobs[-1] for letter, (_, logprobs) in zip(missing, echoes, strict=True)}
    values = {letter: top.get(token, last.get(letter)) for letter, token in tokens.items()}
    return {letter: -math.inf if value is None else float(value) for letter, value in values.items()}


SENTENCES = (
    "The sun rises in the east and sets in the west.",
    "Water freezes at zero degrees and boils at one hundred degrees.",
    "Two plus two is four, and four plus four is eight.",
)


def logprob_faults(endpoint: Endpoint, model: str) -> list[str]:
    """What is broken in the endpoint's log-probabilities for `model`, one sentence each; empty when nothing is."""

    async def check() -> list[str]:
        async with endpoint.client() as client:
            return await find_faults(client, model)

    return asyncio.run(check())


def require_logprobs(endpoint: Endpoint, model: str) -> None:
    """EndpointError when MMLU cannot be measured here, rather than the same failure in thousands of requests."""
    if faults := logprob_faults(endpoint, model):
        raise EndpointError(f"mmlu needs echo and logprobs of {endpoint.base_url}: {'; '.join(faults)}")


async def find_faults(client: AsyncOpenAI, model: str) -> list[str]:
    """The faults of `logprob_faults`, through an open client.

    A weak model passes: its numbers agree with one another and prefer English to the same words reversed. A broken
    endpoint does not: no echo, no numbers, positive or constant ones, or two ways of asking that disagree.
    """
    try:
        tokens = await find_letter_tokens(client, model, "ABCD")
        return [*await _check_values(client, model), *await _check_agreement(client, model, tokens)]
    except EndpointError as error:
        return [str(error)]
    except APIStatusError as error:
        return [f"/v1/completions with echo and logprobs returned status {error.status_code}: {error.message}"]
    except APIConnectionError as error:
        return [f"/v1/completions did not respond: {error}"]
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        return [f"/v1/completions returned something other than a completion ({error})"]


async def _check_values(client: AsyncOpenAI, model: str) -> list[str]:
    """Faults of the numbers themselves: gaps, positive or constant values, no preference for English."""
    totals: list[list[float]] = []
    values: list[float] = []
    for sentence in SENTENCES:
        reverse = " ".join(reversed(sentence.split()))
        sums = []
        for text in (sentence, reverse):
            _, logprobs = await echo_logprobs(client, model, text)
            numbers = [value for value in logprobs[1:] if value is not None]
            if len(numbers) < len(logprobs) - 1:
                return ["the endpoint leaves out log-probabilities of prompt tokens"]
            values += numbers
            sums.append(math.fsum(numbers))
        totals.append(sums)
    faults = []
    if any(value > 1e-3 or math.isnan(value) for value in values):
        faults.append(f"log-probabilities must not be positive, got {max(values)}")
    if max(values) - min(values) < 0.1:
        faults.append(f"all log-probabilities are the same ({values[0]}): the endpoint makes them up")
    elif all(natural <= backwards for natural, backwards in totals):
        faults.append("sentences are no likelier than their words reversed: these are not the prompts' numbers")
    return faults


async def _check_agreement(client: AsyncOpenAI, model: str, tokens: LetterTokens) -> list[str]:
    """A fault where the next token's log-probability differs from the same token's by `echo`."""
    text = "Question: which letter comes first in the alphabet?\nA. A\nB. B\nC. C\nD. D\nAnswer:"
    top = await top_logprobs(client, model, text)
    differences: dict[str, Any] = {}
    for letter, token in tokens.items():
        _, values = await echo_logprobs(client, model, f"{text} {letter}")
        if token in top and values[-1] is not None and abs(top[token] - values[-1]) > TOLERANCE:
            differences[letter] = (round(top[token], 3), round(values[-1], 3))
    if differences:
        return [f"next-token and echoed log-probabilities disagree (next, echoed): {differences}"]
    return []
