"""A request put to vLLM's app without being computed: whether it would be, or what it is refused with.

vLLM checks a request in many places: pydantic's models, the chat template, the tokenizer, the length of the context,
the sampling parameters. Here it goes through all of them, and stops where the engine would begin.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Scope
from vllm.lora.request import LoRARequest

from service.engine.logprobs import LogprobCount, logprob_count
from service.engine.models import Generate, ServedModel, served_model
from service.engine.supported import require

NO_LORA = LoRARequest("~dry-run", 1, "/nowhere")
"""In the place of an adapter that has not been made; it never reaches the engine."""
EVENTS = b"text/event-stream; charset=utf-8"
"""The content type of a stream."""
dry_run: ContextVar[asyncio.Event | None] = ContextVar("fusion_dry_run", default=None)
"""Of a request that is not to be computed: set once it would be."""


class RefusedError(Exception):
    """vLLM's app refuses a request; `answer` is what it says."""

    def __init__(self, answer: Response) -> None:
        super().__init__(answer.status_code)
        self.answer = answer

    @property
    def message(self) -> str:
        """The message of the answer's error object."""
        try:
            return str(json.loads(bytes(self.answer.body))["error"]["message"])
        except (ValueError, LookupError, TypeError):
            return bytes(self.answer.body).decode(errors="replace")


async def try_request(app: ASGIApp, scope: Scope, body: bytes, model: str, chat_template: str | None = None) -> None:
    """Put a POST to vLLM's `app`; raise `RefusedError` unless an answer would be computed, or is there at once."""
    passed = asyncio.Event()
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    answer: list[Message] = []
    is_stream = False

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await passed.wait()
        return {"type": "http.disconnect"}  # vLLM ends what it has begun, as for a client that leaves

    async def collect(message: Message) -> None:
        nonlocal is_stream
        if message["type"] == "http.response.start" and message["status"] < 400:
            is_stream = (b"content-type", EVENTS) in [(name.lower(), value) for name, value in message["headers"]]
            if not is_stream:
                passed.set()
        if not passed.is_set():
            answer.append(message)

    tokens = (dry_run.set(passed), served_model.set(ServedModel(model, NO_LORA, chat_template)))
    count = logprob_count.set(LogprobCount())
    try:
        await app({**scope, "state": dict(scope.get("state", {}))}, receive, collect)
    finally:
        dry_run.reset(tokens[0])
        served_model.reset(tokens[1])
        logprob_count.reset(count)
    if not passed.is_set() and answer:
        content = b"".join(part.get("body", b"") for part in answer[1:])
        if not is_stream:
            refusal = Response(content, answer[0]["status"])
            refusal.raw_headers = list(answer[0]["headers"])
            raise RefusedError(refusal)
        if (error := _find_error(content)) is not None:
            raise RefusedError(error)


def _find_error(events: bytes) -> Response | None:
    """The answer for an error that a stream has brought: what takes time to check, vLLM checks after its head."""
    for line in events.splitlines():
        event = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data: {") else {}
        if event.get("type") == "error" and "error" in event:  # of /v1/messages, in its own shape
            return JSONResponse(event, 400)
        error = event if event.get("type") == "error" else event.get("error")  # of /v1/responses, of the others
        if error:
            code = error.get("code")
            status = code if isinstance(code, int) else 400
            kind = error.get("type", "error")
            fields = {"type": "BadRequestError" if kind == "error" else kind, "code": status}
            return JSONResponse({"error": {"param": None, **error, **fields}}, status)
    return None


def stop_dry_runs(generate: Generate, check: Callable[[Any, Any], None]) -> Generate:
    """vLLM's `generate` that computes nothing in a dry run; `check` has what it does with a prompt and parameters
    before the engine sees them.
    """

    async def wait() -> AsyncGenerator[Any, None]:
        await asyncio.Event().wait()  # until the request is ended
        yield

    def generate_or_stop(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        passed = dry_run.get()
        if passed is None:
            return generate(prompt, sampling_params, *args, **kwargs)
        check(prompt, sampling_params)
        passed.set()
        return wait()

    return generate_or_stop


def input_check(client: Any, tasks: tuple[Any, ...]) -> Callable[[Any, Any], None]:
    """The check of prompts and sampling parameters that vLLM's engine `client` does when a generation starts."""
    require(client, "input_processor")
    require(client.input_processor, "process_inputs")

    def check(prompt: Any, sampling_params: Any) -> None:
        client.input_processor.process_inputs("fusion-dry-run", prompt, sampling_params, tasks)

    return check
