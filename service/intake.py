"""The intake before vLLM's routes: resolves the fusion that a request names, and leases it for as long as vLLM answers.

Pure ASGI, so that streams pass through chunk by chunk. A request for the plain base is read once and passed
on byte for byte.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from adapters import Recipe
from adapters.recipes import NAME_PATTERN
from service.body import check_arguments, check_counts, parse_body
from service.clients import OBJECTIVE, identify_client
from service.decisions import Decisions
from service.defaults import with_defaults
from service.edge.bodies import replay
from service.edge.request_ids import check_id
from service.engine.chat import RESERVED_ARGUMENTS
from service.engine.dry_run import NO_LORA, RefusedError, try_request
from service.engine.logprobs import LogprobCount, logprob_count
from service.engine.models import LoRARequest, ServedModel, meter, mix_request, served_model, start_turns
from service.engine.turns import current_client, current_priority
from service.errors import ApiError, api_error, error_response
from service.metered import MeteredSend
from service.metrics import Metrics
from service.pool import Check, Lease, Pool
from service.resolve import Fusion, Names
from service.spelling import check_keys
from service.validation import MAX_QUOTED

log = logging.getLogger("fusion")

MAX_RECIPE_HEADER = 2048
"""Bytes; a longer recipe is left out of the headers."""
FUSION_KEYS = {"fusion", "strict"}
"""Request keys that vLLM does not know."""
ASKING_KEYS = {"model", "fusion", "messages", "prompt", "input"}
"""Request keys of which one that asks a model has at least one."""


def fusion_headers(fusion: Fusion, stack: str, lease: Lease | None) -> list[tuple[bytes, bytes]]:
    """The `x-fusion-*` headers of an answer, the recipe percent-encoded; `stack` is what routers keep it together by.

    Without a lease nothing was computed.
    """
    recipe = quote(fusion.recipe.format(), safe="*+(),=@ ")
    pairs = {"x-fusion-digest": fusion.digest, "x-fusion-stack": stack}
    if lease is not None:
        pairs |= {
            "x-fusion-mode": lease.mode,
            "x-fusion-source": lease.source,
            "x-fusion-rank": str(lease.rank),
            "x-fusion-error": f"{lease.resident.error:.3g}",
        }
    if len(recipe) <= MAX_RECIPE_HEADER:
        pairs["x-fusion-recipe"] = recipe
    return [(key.encode(), value.encode()) for key, value in pairs.items()]


def public_name(fusion: Fusion, sent: Any) -> str:
    """What events of the key-value cache call a request: the name that it `sent`, else the recipe's canonical text,
    with commas percent-encoded, which parsers split at; the digest of a text that is longer than any name.
    """
    if isinstance(sent, str) and NAME_PATTERN.fullmatch(sent):
        return sent
    text = fusion.recipe.format().replace("%", "%25").replace(",", "%2C")
    return text if len(text) <= MAX_RECIPE_HEADER else fusion.digest


class Intake:
    """ASGI app in front of vLLM's."""

    def __init__(
        self,
        app: ASGIApp,
        names: Names,
        pool: Pool,
        metrics: Metrics,
        *,
        strict: bool,
        keyed: bool,
        fair: bool = False,
        priorities: Mapping[str, int] | None = None,
    ) -> None:
        self._app = app
        self._names = names
        self._pool = pool
        self._metrics = metrics
        self._strict = strict
        self._keyed, self._fair = keyed, fair
        self._priorities = priorities or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what names no model; resolve and lease the rest, or answer with the error."""
        # uvicorn starts a pipelined request in the context of the one before it.
        served_model.set(None)
        meter.set(None)
        start_turns.set(asyncio.Lock())
        logprob_count.set(LogprobCount())
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        current_client.set(identify_client(scope, keyed=self._keyed, fair=self._fair))
        current_priority.set(self._priorities.get(Headers(scope=scope).get(OBJECTIVE, ""), 0))
        whole = await receive()  # the edge has read it to its end
        metered = MeteredSend(send, self._metrics, self._names.registry)
        async with AsyncExitStack() as leases:
            try:
                body = await self._prepare(scope, whole["body"], metered, leases)
            except RefusedError as refused:
                await refused.answer(scope, receive, metered)
                return
            except Exception as error:
                if api_error(error).status == 500:
                    log.exception("a request failed before it reached the engine")
                await error_response(error)(scope, receive, metered)
                return
            await self._app(scope, replay({**whole, "body": body}, receive), metered)

    async def _prepare(self, scope: Scope, raw: bytes, metered: MeteredSend, leases: AsyncExitStack) -> bytes:
        """Lease what the body's fusion needs, set this request's context and headers, and return the body for vLLM."""
        body = parse_body(raw)
        if isinstance(body, dict):
            _check(body)
        if not isinstance(body, dict) or not {"model", "fusion"} & body.keys():
            metered.label = None
            return raw
        fusion = self._resolve(body)
        metered.label = "(base)" if fusion is None else fusion.label
        meter.set(metered)  # for this request's task alone: each has a context of its own
        if fusion is None:
            return self._prepare_base(body, raw)
        strict = body.get("strict", self._strict)
        if not isinstance(strict, bool):
            raise ApiError(400, f"'strict' must be true or false, got {json.dumps(strict)[:100]}.", param="strict")
        if body.get("use_beam_search") and not fusion.recipe.is_constant:
            # vLLM gives each step of a beam as a prompt of its own.
            message = "'use_beam_search' works with weights that are the same at all positions and prompts only."
            raise ApiError(400, message, param="use_beam_search")
        if body.get("background"):
            # vLLM would go on after the answer, when the adapters under it may be unloaded.
            raise ApiError(400, "'background' works with the base model only.", param="background")
        sent = body.get("fusion") or body.get("model")
        changed = bool(fusion.defaults or body.keys() & FUSION_KEYS)
        if body.get("model") is None:
            body["model"] = self._names.base
        body = with_defaults(body, fusion.defaults, scope["path"])
        content, template = strip_fusion_keys(body) if changed else raw, fusion.defaults.get("chat_template")
        check = partial(try_request, self._app, scope, content, body["model"], template)
        client = current_client.get()
        if scope["path"].endswith("/render"):  # tokens alone: nothing is loaded for them
            await leases.enter_async_context(self._pool.checks.hold(client))
            metered.headers = fusion_headers(fusion, self._pool.home_key(fusion), None)
            self._serve(ServedModel(body["model"], NO_LORA, template), leases)
            return content
        lease = await leases.enter_async_context(
            self._lease(fusion, metered, strict=strict, client=client, check=check)
        )
        metered.headers = fusion_headers(fusion, self._pool.home_key(fusion), lease)
        metered.may_wait = self._pool.may_wait(lease)
        public = public_name(fusion, sent)
        lora = mix_request(lease.resident.request, lease.resident.key, lease.weights, public)
        gate = None
        if fusion.readout is not None:
            make = partial(self._mix, fusion, lease, public)
            metered.decisions = Decisions(fusion, fusion.readout, make, self._metrics)
            gate = metered.decisions.gate_pass()
        self._serve(ServedModel(body["model"], lora, template, gate), leases)
        return content

    def _prepare_base(self, body: dict[str, Any], raw: bytes) -> bytes:
        """The body for vLLM of a request for the base, which knows one name."""
        if is_renamed := body.get("model") not in (None, self._names.base):
            body["model"] = self._names.base
        return strip_fusion_keys(body) if is_renamed or body.keys() & FUSION_KEYS else raw

    def _serve(self, model: ServedModel, leases: AsyncExitStack) -> None:
        leases.callback(served_model.reset, served_model.set(model))

    async def _mix(self, fusion: Fusion, lease: Lease, public: str, recipe: Recipe) -> LoRARequest:
        """The mix of a gate's fusion at the weights of `recipe`."""
        weights = await self._pool.weigh(lease, replace(fusion, recipe=recipe, readout=None))
        return mix_request(lease.resident.request, lease.resident.key, weights, public)

    def _resolve(self, body: dict[str, Any]) -> Fusion | None:
        """The fusion that a body names; None for the base."""
        model, value = body.get("model"), body.get("fusion")
        if value is None:
            return None if model is None else self._names.look_up(model)
        if model not in (None, self._names.base):
            raise ApiError(
                400,
                f"'fusion' works with the base model {self._names.base!r} only, not with {model!r:.{MAX_QUOTED}}: "
                "name the fusion in one place.",
                param="fusion",
            )
        return self._names.resolve_field(value)

    @asynccontextmanager
    async def _lease(
        self, fusion: Fusion, metered: MeteredSend, *, strict: bool, client: str | None, check: Check
    ) -> AsyncIterator[Lease]:
        lease = await self._pool.acquire(fusion, strict=strict, client=client, check=check)
        gauge = self._metrics.leases.labels(lease.resident.kind)
        gauge.inc()

        def release() -> None:
            gauge.dec()
            self._pool.release(lease)

        try:
            yield lease
        finally:
            metered.call_at_end(release)


def _check(body: dict[str, Any]) -> None:
    """Raise 400 for what vLLM would take without a bound, or without a word."""
    check_id(body.get("request_id"), "request_id")
    for source in (body, body.get("vllm_xargs")):
        if isinstance(source, dict):
            check_id(source.get("session_id"), "session_id")
    check_counts(body)
    check_arguments(body, RESERVED_ARGUMENTS)
    if body.keys() & ASKING_KEYS:
        check_keys(body)


def strip_fusion_keys(body: dict[str, Any]) -> bytes:
    """`body` as JSON without the keys that vLLM does not know."""
    return json.dumps({key: value for key, value in body.items() if key not in FUSION_KEYS}).encode()
