"""The intake before a tiny app: what reaches it, what is added to its answers, and how long a lease is held."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from adapters import parse
from service.answer_headers import MAX_RECIPE_HEADER, fusion_headers
from service.clients import OBJECTIVE
from service.engine.dry_run import NO_LORA
from service.engine.models import LoRARequest, ServedModel, count_usage, mix_request, served_model
from service.engine.names import weight_row
from service.errors import ApiError
from service.evictions import Resident
from service.intake import Intake
from service.metrics import Metrics
from service.pool import Lease
from service.resolve import Fusion
from tests.service.intakes import BASE, CHAT, Setup, make_setup


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return make_setup(tmp_path)


@pytest.mark.parametrize("body", [b'{ "model":"base",\n"n": 1e0 }', b'{"prompt" : "none named"}', b"[1,  2]", b""])
def test_what_needs_no_fusion_reaches_vllm_byte_for_byte(setup: Setup, body: bytes) -> None:
    answer = setup.post(body)
    assert (answer.status_code, setup.vllm.bodies, setup.vllm.served) == (200, [body], [None])
    assert not [key for key in answer.headers if key.startswith("x-fusion")]


@pytest.mark.parametrize(
    "spelling", [{"model": "a"}, {"model": BASE, "fusion": "1*a"}, {"fusion": {"adapters": [{"name": "a"}]}}]
)
def test_a_fusion_is_leased_while_vllm_answers_and_no_longer(setup: Setup, spelling: dict[str, Any]) -> None:
    answer = setup.post({**spelling, "strict": False, "prompt": "x"})
    assert (answer.status_code, setup.vllm.leased, setup.pool.leased) == (200, [1], 0)
    assert json.loads(setup.vllm.bodies[0]) == {"model": spelling.get("model", BASE), "prompt": "x"}
    assert answer.headers["x-fusion-mode"] == "mixed"
    assert answer.headers["x-fusion-rank"] == "5"
    assert setup.count("(inline)", 200) == 1


def test_vllm_sees_the_model_as_typed_and_the_weights_in_the_adapters_name(setup: Setup) -> None:
    setup.post({"model": " 0.25*a + -1.5*b"})
    (seen,) = setup.vllm.served
    assert seen is not None
    assert seen.model == " 0.25*a + -1.5*b"
    row = weight_row(seen.lora.lora_name)
    assert row is not None
    assert row.tolist() == [0.25, 0.25, -1.5, -1.5, -1.5]


def test_a_build_is_served_under_its_own_name() -> None:
    own = LoRARequest("~build/x", 1001, "/x")
    built = Lease(Resident("x", "build", Path("x"), own, 4), "built", None, 4)
    assert mix_request(built.resident.request, built.resident.key, built.weights).lora_name == own.lora_name


def test_a_profile_s_defaults_fill_what_the_request_leaves_out(setup: Setup) -> None:
    setup.post({"model": "short", "messages": []})
    setup.post({"model": "short", "messages": [], "max_tokens": 1})
    assert [json.loads(body)["max_tokens"] for body in setup.vllm.bodies] == [7, 1]
    assert [seen and seen.chat_template for seen in setup.vllm.served] == ["{{ x }}"] * 2
    assert setup.count("short", 200) == 2


@pytest.mark.parametrize(
    ("body", "status", "param", "label"),
    [
        (b"{", 400, None, "(refused)"),
        (b"[" * 100_000, 400, None, "(refused)"),
        ({"model": "nobody"}, 404, "model", "(refused)"),
        ({"model": "a", "fusion": "b"}, 400, "fusion", "(refused)"),
        ({"model": "a", "strict": "yes"}, 400, "strict", "(inline)"),
        ({"model": "a", "background": True}, 400, "background", "(inline)"),
    ],
)
def test_refusals_name_the_key_reach_no_engine_and_are_counted(
    setup: Setup, body: Any, status: int, param: str | None, label: str
) -> None:
    answer = setup.post(body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert (setup.vllm.bodies, setup.pool.leased, setup.count(label, status)) == ([], 0, 1)


def test_a_lease_that_cannot_be_had_is_the_answer(setup: Setup) -> None:
    setup.pool.error = ApiError(400, "would lose too much", param="strict")
    answer = setup.post({"model": "a", "strict": True})
    assert (answer.status_code, setup.vllm.bodies, setup.count("(inline)", 400)) == (400, [], 1)


@pytest.mark.parametrize(("value", "strict"), [({}, False), ({"strict": True}, True)])
def test_strict_is_the_request_s_else_the_server_s(setup: Setup, value: dict[str, bool], strict: bool) -> None:
    setup.post({"model": "a", **value})
    assert setup.pool.strict is strict


def test_a_lease_is_given_back_when_vllm_fails(setup: Setup) -> None:
    setup.vllm.error = RuntimeError("boom")
    assert setup.post({"model": "a"}).status_code == 500
    assert (setup.vllm.leased, setup.pool.leased) == ([1], 0)
    assert setup.series.get_sample_value("fusion_stack_requests", {"kind": "stack"}) == 0


def call(app: Intake, messages: Sequence[Message], then: Callable[[Message], None] = lambda _: None) -> list[Message]:
    """What `app` sends for a POST whose `receive` gives `messages` in turn."""
    sent: list[Message] = []
    coming = iter(messages)

    async def receive() -> Message:
        return next(coming)

    async def send(message: Message) -> None:
        sent.append(message)
        then(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    asyncio.run(app(scope, receive, send))
    return sent


def test_chunks_are_sent_as_vllm_sends_them_under_the_lease(setup: Setup) -> None:
    progress: list[tuple[str, int]] = []

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for chunk in (b"one", b"two"):
            progress.append(("made", setup.pool.leased))
            await send({"type": "http.response.body", "body": chunk, "more_body": chunk == b"one"})

    intake = Intake(stream, setup.names, setup.pool, Metrics(CollectorRegistry()), strict=False)  # type: ignore[arg-type]  # a fake pool
    messages: list[Message] = [{"type": "http.request", "body": b'{"model": "a"}'}]
    sent = call(intake, messages, lambda message: progress.append((message["type"][14:], setup.pool.leased)))
    assert progress == [("start", 1), ("made", 1), ("body", 1), ("made", 1), ("body", 1)]
    assert [message["body"] for message in sent[1:]] == [b"one", b"two"]


class Stream:
    """An app that streams what the engine makes, as vLLM does, and leaves the generator behind when `send` fails."""

    def __init__(self) -> None:
        self.aborted = False
        self.generator: Any = None

    async def generate(self) -> AsyncGenerator[Any, None]:
        try:
            while True:
                yield SimpleNamespace(prompt_token_ids=[1], outputs=[])
                await asyncio.sleep(0.01)
        finally:
            self.aborted = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        self.generator = count_usage(self.generate)()
        async for _ in self.generator:
            await send({"type": "http.response.body", "body": b"chunk", "more_body": True})


@pytest.mark.parametrize("ending", ["send fails", "task is canceled in send", "task is canceled in the engine"])
def test_a_lease_ends_with_the_generation_of_a_client_that_does_not_read(setup: Setup, ending: str) -> None:
    app = Stream()
    intake = Intake(app, setup.names, setup.pool, Metrics(CollectorRegistry()), strict=False)  # type: ignore[arg-type]  # a fake pool

    async def receive() -> Message:
        return {"type": "http.request", "body": b'{"model": "a"}'}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body" and ending == "send fails":
            raise OSError("the client does not read")
        if message["type"] == "http.response.body" and ending == "task is canceled in send":
            await asyncio.sleep(3600)

    async def run() -> None:
        task = asyncio.create_task(
            intake({"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive, send)
        )
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        if not app.aborted:  # the engine still computes with it
            assert setup.pool.leased == 1
            await app.generator.aclose()
        assert app.aborted
        assert setup.pool.leased == 0

    asyncio.run(run())
    assert setup.pool.strict is not None, "it was leased"


def test_an_answer_that_outlives_its_profile_does_not_bring_its_series_back(setup: Setup) -> None:
    async def delete(scope: Scope, receive: Receive, send: Send) -> None:
        setup.names.registry.snapshot.profiles.pop("short")
        await PlainTextResponse("fine")(scope, receive, send)

    setup.intake._app = delete  # noqa: SLF001 - in the place of vLLM
    setup.post({"model": "short"})
    assert (setup.count("short", 200), setup.count("(deleted)", 200)) == (None, 1)


@pytest.mark.parametrize("value", ["../../x", "a\x00b", "a b", "", "\u00fc", "a" * 129, "a\nb"])
@pytest.mark.parametrize("key", ["request_id", "session_id", "vllm_xargs"])
def test_an_id_may_not_spoil_an_answer_or_a_log(setup: Setup, value: str, key: str) -> None:
    ids = {key: {"session_id": value} if key == "vllm_xargs" else value}
    answer = setup.post({"prompt": "x", **ids})
    assert (answer.status_code, setup.vllm.bodies) == (400, [])
    assert "expected 1 to 128" in answer.json()["error"]["message"]
    assert setup.post({"prompt": "x", "request_id": "req_1.2:3", "vllm_xargs": None}).status_code == 200


def test_a_recipe_that_is_too_long_for_a_header_is_left_out(setup: Setup) -> None:
    names = [f"adapter-{i:050}" for i in range(60)]
    recipe = parse(" + ".join(f"0.125*{name}" for name in names))
    lease = asyncio.run(setup.pool.acquire(Fusion(recipe, dict.fromkeys(names, ""), "d" * 64, "(inline)")))
    headers = dict(fusion_headers(Fusion(recipe, {}, "d" * 64, "(inline)"), "e" * 64, lease))
    assert len(recipe.format()) > MAX_RECIPE_HEADER
    assert b"x-fusion-recipe" not in headers
    assert headers[b"x-fusion-digest"] == b"d" * 64


def test_answers_say_what_routers_keep_a_fusion_together_by(setup: Setup) -> None:
    answer = setup.post({"model": "0.5*a + 0.5*b", "messages": []})
    assert answer.headers["x-fusion-stack"] == "cd" * 32
    assert "x-fusion-stack" not in setup.post({"model": BASE, "messages": []}).headers


def test_a_prompt_is_rendered_with_the_profile_s_defaults_and_nothing_is_loaded(setup: Setup) -> None:
    answer = setup.post({"model": "short", "messages": []}, f"{CHAT}/render")
    assert (answer.status_code, answer.headers["x-fusion-stack"]) == (200, "cd" * 32)
    assert "x-fusion-mode" not in answer.headers
    assert json.loads(setup.vllm.bodies[0])["max_tokens"] == 7
    assert setup.vllm.served == [ServedModel("short", NO_LORA, "{{ x }}")]
    assert setup.vllm.leased == [0]
    assert served_model.get() is None


@pytest.mark.parametrize(
    ("sent", "public"),
    [
        ({"model": "short"}, "short"),
        ({"model": "short@1"}, "short@1"),
        ({"model": f"{BASE}:short"}, f"{BASE}:short"),
        ({"model": "a"}, "a"),
        ({"fusion": "short"}, "short"),
        ({"model": ".5*b+5e-1*a"}, "0.5*a + 0.5*b"),
        ({"fusion": {"adapters": [{"name": "a", "weight": 0.5}]}}, "0.5*a"),
        ({"model": "answer(0.5*a)"}, "answer(0.5*a)"),
        ({"model": "1*a + fade(1..0.2, 8)*b"}, "1*a + fade(1..0.2%2C 8)*b"),
    ],
)
def test_events_have_the_name_that_was_sent_else_the_canonical_recipe(
    setup: Setup, sent: dict[str, Any], public: str
) -> None:
    assert setup.post({"messages": [], **sent}).status_code == 200
    served = setup.vllm.served[0]
    assert served is not None
    assert served.lora.base_model_name == public


def test_trace_context_reaches_vllm(setup: Setup) -> None:
    seen = []

    async def look(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["headers"])[b"traceparent"])
        await PlainTextResponse("fine")(scope, receive, send)

    setup.intake._app = look  # noqa: SLF001 - in the place of vLLM
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    assert setup.post({"model": "short", "messages": []}, traceparent=trace).status_code == 200
    assert seen == [trace.encode()]


def test_a_routers_objective_has_the_priority_that_the_operator_gave_it(tmp_path: Path) -> None:
    setup = make_setup(tmp_path, priorities={"chat": 10})
    setup.post({"model": "a"})
    for objective in ("chat", "invented"):
        setup.post({"model": "a"}, **{OBJECTIVE: objective})
    assert setup.vllm.priorities == [0, 10, 0]
