"""How many log-probabilities one request may ask for: each is an object of Python, made on the event loop.

A prompt of 20 KB with `echo`, 20 log-probabilities and 128 answers would be 22 million of them, which take gigabytes
and a minute of the event loop.
"""

from collections.abc import AsyncGenerator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind

from service.engine.models import Generate

MAX_LOGPROBS = 2**15
"""In one answer that is sent as a whole, those of its prompts too: a token has one, and one for each alternative."""
MAX_KEPT = 2**20
"""In memory until a request has been answered; of answers that come as a whole, at most so many are asked for."""


@dataclass(slots=True)
class LogprobCount:
    """How many log-probabilities a request has got, and may get."""

    got: int = 0
    planned: int = 0

    def check(self, limit: int) -> None:
        """Raise `VLLMClientError` when there are more than `limit`, or may be more than MAX_KEPT."""
        if self.got > limit or self.planned > MAX_KEPT:
            count, limit = (self.got, limit) if self.got > limit else (self.planned, MAX_KEPT)
            raise VLLMClientError(
                f"The request asks for {count} log-probabilities, those of alternatives and prompts included; the "
                f"limit is {limit}. Ask for fewer alternatives, prompts, answers ('n') or tokens ('max_tokens')."
            )


logprob_count: ContextVar[LogprobCount | None] = ContextVar("fusion_logprobs", default=None)
"""Of the request at hand."""


def bound_logprobs(generate: Generate, vocabulary: int) -> Generate:
    """vLLM's `generate` that ends a request with too many log-probabilities; `vocabulary` tokens is what -1 means."""

    def count_each(number: int | None) -> int:
        return 0 if number is None else 1 + (vocabulary if number < 0 else number)

    async def count_answers(
        outputs: AsyncGenerator[Any, None], each: int, count: LogprobCount, limit: int
    ) -> AsyncGenerator[Any, None]:
        try:
            async for output in outputs:
                count.got += each * sum(len(answer.token_ids) for answer in output.outputs)
                count.check(limit)
                yield output
        finally:
            await outputs.aclose()

    def bounded(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        prompt_each, each = count_each(sampling_params.prompt_logprobs), count_each(sampling_params.num_logprobs)
        if not prompt_each and not each:
            return generate(prompt, sampling_params, *args, **kwargs)
        count, n = logprob_count.get() or LogprobCount(), sampling_params.n
        if prompt_each:  # with `echo`, every answer repeats them
            count.got += prompt_each * n * len(prompt.get("decoder_prompt", prompt)["prompt_token_ids"])
            count.check(MAX_LOGPROBS)
        is_streamed = sampling_params.output_kind is RequestOutputKind.DELTA
        if not is_streamed:
            count.planned += each * n * (sampling_params.max_tokens or 0)
        limit = MAX_KEPT if is_streamed else MAX_LOGPROBS
        count.check(limit)
        return count_answers(generate(prompt, sampling_params, *args, **kwargs), each, count, limit)

    return bounded
