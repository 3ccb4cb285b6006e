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

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from adapters import Recipe
from service.admission import TokenBudget, admit, count_build
from service.answer_headers import fusion_headers, public_name
from service.body import check_arguments, check_counts, check_fusion_keys, parse_body
from service.callers import find_caller
from service.clients import OBJECTIVE, identify_client
from service.decisions import Decisions
from service.defaults import with_defaults
from service.edge.bodies import replay
from service.edge.request_ids import check_id
from service.edge.request_log import ENTRY
from service.engine.budgets import budget
from service.engine.chat import RESERVED_ARGUMENTS
from service.engine.dry_run import NO_LORA, RefusedError, try_request
from service.engine.logprobs import LogprobCount, logprob_count
from service.engine.models import LoRARequest, ServedModel, meter, mix_request, served_model, start_turns
from service.engine.turns import current_client, current_priority
from service.errors import ApiError, api_error, error_response
from service.hidden import check_hidden
from service.limits import Account, Limits
from service.metered import MeteredSend
from service.metrics import Metrics
from service.policy import COMPUTES_NOTHING, Policy
from service.policy_rules import Rules
from service.pool import Check, Lease, Pool
from service.receipt_keys import Key
from service.receipts import KEY, Receipts
from service.resolve import Fusion, Names
from service.spelling import check_keys
from service.tracing import traced
from service.validation import MAX_QUOTED

log = logging.getLogger("fusion")

FUSION_KEYS = {"fusion", "strict", KEY}
"""Request keys that vLLM does not know."""
ASKING_KEYS = {"model", "fusion", "messages", "prompt", "input"}
"""Request keys of which one that asks a model has at least one."""


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
        fair: bool = False,
        priorities: Mapping[str, int] | None = None,
        policy: Policy | None = None,
        receipt_key: Key | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._app = app
        self._policy = policy or Policy(Rules(), names.registry, max_rank=0)
        self._receipts = Receipts(receipt_key, base=names.base, registry=names.registry.identity, policy=self._policy)
        self._names = names
        self._pool = pool
        self._metrics = metrics
        self._strict = strict
        self._fair = fair
        self._priorities = priorities or {}
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what names no model; resolve and lease the rest, or answer with the error."""
        # uvicorn starts a pipelined request in the context of the one before it.
        served_model.set(None)
        meter.set(None)
        budget.set(None)
        start_turns.set(asyncio.Lock())
        logprob_count.set(LogprobCount())
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        current_client.set(identify_client(scope, fair=self._fair))
        current_priority.set(self._priorities.get(Headers(scope=scope).get(OBJECTIVE, ""), 0))
        whole = await receive()  # the edge has read it to its end
        tenant = find_caller(scope).tenant
        metered = MeteredSend(send, self._metrics, self._names.registry, scope.get(ENTRY), tenant=tenant)
        async with AsyncExitStack() as leases:
            try:
                if self._limits is not None and (account := self._limits.find_account(find_caller(scope))) is not None:
                    await self._admit(account, metered, leases)
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

    async def _admit(self, account: Account, metered: MeteredSend, leases: AsyncExitStack) -> None:
        """Have a request count against the limits of its caller until its last generation has ended."""
        metered.account = account
        place = await admit(account)
        leases.callback(metered.call_at_end, partial(place.settle, 0))
        meter.set(metered)  # it says when the answer begins, whatever the request names
        budget.set(TokenBudget(account, metered))
        metered.may_wait = True

    async def _prepare(self, scope: Scope, raw: bytes, metered: MeteredSend, leases: AsyncExitStack) -> bytes:
        """Lease what the body's fusion needs, set this request's context and headers, and return the body for vLLM."""
        body = parse_body(raw)
        if isinstance(body, dict):
            _check(body)
        if not isinstance(body, dict) or not {"model", "fusion"} & body.keys():
            await self._allow(scope, raw, body, None, metered)
            metered.label = None
            return strip_fusion_keys(body) if isinstance(body, dict) and body.keys() & FUSION_KEYS else raw
        caller = find_caller(scope)
        fusion = self._resolve(body, self._names.view(caller.tenant))
        metered.label = "(base)" if fusion is None else fusion.label
        await self._allow(scope, raw, body, fusion, metered)
        meter.set(metered)  # for this request's task alone: each has a context of its own
        if fusion is None:
            return self._prepare_base(body, raw)
        check_hidden(fusion.profile, caller, scope["path"], body)
        strict = check_fusion_keys(body, fusion.recipe, strict=self._strict)
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
        if metered.receipt is not None:
            metered.receipt.add_lease(lease)
        metered.may_wait |= self._pool.may_wait(lease)
        public = public_name(fusion, sent)
        lora = mix_request(lease.resident.request, lease.resident.key, lease.weights, public)
        gate = None
        if fusion.readout is not None:
            make = partial(self._mix, fusion, lease, public)
            metered.decisions = Decisions(fusion, fusion.readout, make, self._metrics)
            gate = metered.decisions.gate_pass()
        self._serve(ServedModel(body["model"], lora, template, gate), leases)
        return content

    @traced("policy")
    async def _allow(self, scope: Scope, raw: bytes, body: Any, fusion: Fusion | None, metered: MeteredSend) -> None:
        """Raise 403 unless the policy lets the fusion answer, and begin the receipt if the request asks for one."""
        caller = find_caller(scope)
        verdict = await self._policy.check(fusion, caller, path=scope["path"])
        metered.receipt = self._receipts.begin(scope, raw, body, fusion, caller, verdict)
        if fusion is None and not scope["path"].endswith(COMPUTES_NOTHING):
            self._record_floors(None, is_allowed=not verdict.exempt)

    def _record_floors(self, fusion: Fusion | None, *, is_allowed: bool = False) -> None:
        """Count which weights the adapters have that the policy demands a least one of; `is_allowed` says that the
        rule on the base lets the caller have it alone.
        """
        for adapter, weight in self._policy.floor_weights.find(fusion).items():
            self._metrics.record_floor(adapter, weight, is_allowed=is_allowed)

    def _prepare_base(self, body: dict[str, Any], raw: bytes) -> bytes:
        """The body for vLLM of a request for the base, which knows one name."""
        if is_renamed := body.get("model") not in (None, self._names.base):
            body["model"] = self._names.base
        return strip_fusion_keys(body) if is_renamed or body.keys() & FUSION_KEYS else raw

    def _serve(self, model: ServedModel, leases: AsyncExitStack) -> None:
        leases.callback(served_model.reset, served_model.set(model))

    async def _mix(self, fusion: Fusion, lease: Lease, public: str, recipe: Recipe) -> LoRARequest:
        """The mix of a gate's fusion at the weights of `recipe`."""
        chosen = replace(fusion, recipe=recipe, readout=None, digest=f"{fusion.digest}/{recipe.format()}")
        self._metrics.mixes.see(chosen.digest)
        self._record_floors(chosen)
        weights = await self._pool.weigh(lease, chosen)
        return mix_request(lease.resident.request, lease.resident.key, weights, public)

    @traced("resolve")
    def _resolve(self, body: dict[str, Any], names: Names) -> Fusion | None:
        """The fusion that a body names among `names`; None for the base."""
        model, value = body.get("model"), body.get("fusion")
        if value is None:
            return None if model is None else names.look_up(model)
        if model not in (None, names.base):
            raise ApiError(
                400,
                f"'fusion' works with the base model {names.base!r} only, not with {model!r:.{MAX_QUOTED}}: "
                "name the fusion in one place.",
                param="fusion",
            )
        return names.resolve_field(value)

    @asynccontextmanager
    async def _lease(
        self, fusion: Fusion, metered: MeteredSend, *, strict: bool, client: str | None, check: Check
    ) -> AsyncIterator[Lease]:
        async with count_build(metered.account, self._pool, fusion):
            lease = await self._pool.acquire(fusion, strict=strict, client=client, check=check)
        end = metered.count_lease(lease, fusion.digest)
        if fusion.readout is None:
            self._record_floors(fusion)

        def release() -> None:
            end()
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
