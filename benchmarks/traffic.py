"""Streamed requests to a server: throughput and seconds to the first token."""

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import httpx

from benchmarks.common import BASE_NAME
from benchmarks.servers import RunningServer

WORDS = Path(__file__).read_text().split()
_count = itertools.count()
_draw = random.Random(0)


def prompt(words: int = 16) -> str:
    """About 65 tokens that no other request has; 1,000 for 430 `words`."""
    return f"Note {next(_count)} of {time.time_ns()}: " + " ".join(_draw.choices(WORDS, k=words))


async def stream(
    client: httpx.AsyncClient, model: str, tokens: int, text: str, seen: Counter[str] | None = None
) -> tuple[float, int, str]:
    """(seconds to the first token, tokens, source header) of one streamed answer to the prompt `text`; each token is
    counted in `seen` as it comes.
    """
    body = {"model": model, "prompt": text, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    began, first, count = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{model}: {answer.status_code} {(await answer.aread()).decode()}")
        source = answer.headers.get("x-fusion-source", "")
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                first = first or time.perf_counter() - began
                count += 1
                if seen is not None:
                    seen["tokens"] += 1
    return first, count, source


async def _ask_all(
    url: str, models: Sequence[str], tokens: int, prompts: Sequence[str] | None
) -> tuple[float, list[tuple[float, int, str]]]:
    pairs = list(zip(models, prompts or [prompt() for _ in models], strict=True))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=1200, limits=limits) as client:
        began = time.perf_counter()
        answers = await asyncio.gather(*(stream(client, model, tokens, text) for model, text in pairs))
        return time.perf_counter() - began, answers


def throughput(
    server: RunningServer, models: Sequence[str], tokens: int, *, prompts: Sequence[str] | None = None
) -> float:
    """Output tokens per second of all `models` asked at once, each its own of the `prompts`, or a new one."""
    seconds, _ = asyncio.run(_ask_all(server.url, models, tokens, prompts))
    return tokens * len(models) / seconds


def first_token(
    server: RunningServer,
    models: Sequence[str],
    tokens: int = 2,
    *,
    source: str | None = None,
    prompts: Sequence[str] | None = None,
) -> float:
    """Median seconds to the first token of all `models` asked at once, each its own of the `prompts`, or a new one;
    RuntimeError for one from another `source`.
    """
    _, answers = asyncio.run(_ask_all(server.url, models, tokens, prompts))
    for model, (_, _, actual) in zip(models, answers, strict=True):
        if source is not None and actual != source:
            raise RuntimeError(f"{model}: expected an answer from {source!r}, got {actual!r}")
    return median(first for first, _, _ in answers)


def base_first_token(server: RunningServer, n: int) -> float:
    """Median seconds to the base's first token, `n` at once, over several rounds: one alone scatters."""
    return median(first_token(server, [BASE_NAME] * n) for _ in range(15 if n == 1 else 5))
