"""Limits of keys and tenants at the intake: what counts, what is refused and how, and what answers say of it."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send

from service.callers import CALLER, Caller
from service.clients import identify_client
from service.engine.budgets import reserve_tokens
from service.engine.models import count_usage
from service.errors import ApiError
from service.ledger import WINDOW_S, Ledger
from service.limits import Limits, LimitTable, load_limits, read_limits
from service.metrics import Metrics
from service.settings import SettingsError
from tests.service.intakes import BASE, CHAT, Setup, make_setup

ALICE = Caller("alice", "user", "acme")
Make = Callable[..., tuple[Setup, Ledger]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(**table: Any) -> tuple[Setup, Ledger]:
        clock = SimpleNamespace(now=0.5)
        ledger = Ledger(now=lambda: clock.now)
        setup = make_setup(tmp_path, limits=Limits(read_limits(table), ledger, Metrics(CollectorRegistry())))
        setup.caller, setup.clock = ALICE, clock
        return setup, ledger

    return make


def test_requests_count_for_a_minute_and_answers_say_how_many_are_left(make: Make) -> None:
    setup, _ = make(default={"requests": 2}, tenant={"requests": 5})
    answers = [setup.post({"model": BASE, "prompt": "x"}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    refused = answers[2]
    assert refused.headers["x-ratelimit-limit-requests"] == "2"
    assert refused.headers["x-ratelimit-reset-requests"] == "61s"
    assert refused.headers["retry-after"] == "61"
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("RateLimitError", 429)
    assert error["message"] == (
        "The API key 'alice' has a limit of 2 requests a minute; this request would exceed it now: try again in 61 s."
    )
    setup.caller = Caller("bob", "user", "acme")
    assert [setup.post({"model": BASE, "prompt": "x"}).status_code for _ in range(4)] == [200, 200, 429, 429]
    setup.caller = Caller("carol", "user", "acme")
    assert setup.post({"model": BASE}).headers["x-ratelimit-limit-requests"] == "5", "the one with the least left"
    assert "The tenant 'acme'" in setup.post({"model": BASE}).json()["error"]["message"]
    setup.caller = Caller("dave", "user", "other")
    assert setup.post({"model": BASE, "prompt": "x"}).status_code == 200
    setup.clock.now += WINDOW_S + 1
    setup.caller = ALICE
    assert setup.post({"model": BASE, "prompt": "x"}).status_code == 200


def test_a_server_without_keys_and_a_key_without_limits_are_not_limited(make: Make) -> None:
    setup, ledger = make(default={"requests": 1}, roles={"admin": {"requests": float("inf")}})
    for caller in (Caller(), Caller("root", "admin", "")):
        setup.caller = caller
        answers = [setup.post({"model": BASE, "prompt": "x"}) for _ in range(3)]
        assert {answer.status_code for answer in answers} == {200}
        assert not [name for name in answers[0].headers if name.startswith("x-ratelimit")]
    assert not ledger.meters


def test_what_is_refused_for_other_reasons_counts_as_a_request_and_what_is_over_a_limit_does_not(make: Make) -> None:
    setup, ledger = make(default={"requests": 3, "concurrent": 2, "tokens": 9})
    assert setup.post(b"{").status_code == 400
    assert setup.post({"model": "nobody"}).status_code == 404
    assert ledger.find(("key alice", "requests")).used == 2
    place = ledger.take("concurrent", {"key alice": 2}, 2)
    answer = setup.post({"model": BASE})
    assert answer.status_code == 429
    assert "2 requests at once; this request would exceed it now: try again when" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"] == "5"
    place.settle(0)
    ledger.take("tokens", {"key alice": 9}, 9).settle(9)
    assert "9 tokens a minute" in setup.post({"model": BASE}).json()["error"]["message"]
    assert setup.vllm.bodies == []
    assert ledger.find(("key alice", "requests")).used == 2
    assert ledger.find(("key alice", "concurrent")).used == 0


def test_what_is_made_or_loaded_counts_as_a_build_unless_it_is_refused_before(make: Make) -> None:
    setup, ledger = make(default={"builds": 2})
    setup.post({"model": "a", "prompt": "x"})
    assert ledger.find(("key alice", "builds")).used == 0, "it is there"
    setup.pool.is_warm = False
    setup.pool.error = ApiError(503, "no place")
    assert setup.post({"model": "a", "prompt": "x"}).status_code == 503
    assert ledger.find(("key alice", "builds")).used == 0
    setup.pool.error = None
    statuses = [setup.post({"model": "a", "prompt": "x"}).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    setup.pool.is_warm = True
    assert setup.post({"model": "a", "prompt": "x"}).status_code == 200


class Engine:
    """An app that streams what an engine makes of a prompt of five tokens; `end` says how that ends."""

    def __init__(self, ledger: Ledger, end: str) -> None:
        self.ledger, self.end = ledger, end
        self.reserved: list[int] = []
        self.generate = reserve_tokens(count_usage(self._generate), 100)

    async def _generate(self, prompt: Any, params: Any) -> AsyncGenerator[Any, None]:
        self.reserved.append(self.ledger.find(("key alice", "tokens")).held)
        for number in range(4):
            if self.end == "engine dies" and number == 2:
                raise RuntimeError("the engine died")
            output = SimpleNamespace(token_ids=[number], index=0)
            yield SimpleNamespace(prompt_token_ids=[1] * 5, outputs=[output], metrics=None)
            await asyncio.sleep(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        params = SimpleNamespace(max_tokens=20, n=1)
        outputs = self.generate({"prompt_token_ids": [1] * 5}, params)
        try:
            async for _ in outputs:
                await send({"type": "http.response.body", "body": b"data: token\n\n", "more_body": True})
        except Exception as error:  # as vLLM's streams do
            await send({"type": "http.response.body", "body": f"data: {error}\n\n".encode(), "more_body": True})
        finally:
            await outputs.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.mark.parametrize("end", ["whole", "engine dies", "send fails", "canceled"])
@pytest.mark.parametrize("body", [{"model": "a"}, {"model": BASE}, {"prompt": "none named"}])
def test_nothing_stays_reserved_however_a_stream_ends(make: Make, end: str, body: dict[str, Any]) -> None:
    setup, ledger = make(default={"tokens": 100, "concurrent": 1, "requests": 9})
    engine = Engine(ledger, end)
    setup.intake._app = engine  # noqa: SLF001 - in the place of vLLM
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message: Message) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and end == "send fails":
            raise OSError("the client does not read")
        if message["type"] == "http.response.body" and end == "canceled":
            await asyncio.sleep(60)

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], CALLER: ALICE}
        task = asyncio.create_task(setup.intake(scope, receive, send))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(run())
    assert engine.reserved == [25]
    assert dict(sent[0]["headers"])[b"x-ratelimit-remaining-tokens"] == b"75", "it begins once they are reserved"
    assert ledger.find(("key alice", "tokens")).held == ledger.find(("key alice", "concurrent")).held == 0
    assert setup.pool.leased == 0


def test_a_stream_that_may_not_have_its_tokens_is_answered_429_before_it_begins(make: Make) -> None:
    setup, ledger = make(default={"tokens": 40})
    setup.intake._app = Engine(ledger, "whole")  # noqa: SLF001 - in the place of vLLM
    held = ledger.take("tokens", {"key alice": 40}, 30)
    answer = setup.post({"model": "a"})
    assert answer.status_code == 429
    assert "40 tokens a minute; this request, which may take 25, would" in answer.json()["error"]["message"]
    assert answer.headers["x-ratelimit-remaining-tokens"] == "10"
    held.settle(0)
    answer = setup.post({"model": "a"})
    assert (answer.status_code, answer.text.count("token")) == (200, 4)
    assert setup.series.get_sample_value("fusion_tokens_total", {"profile": "(inline)", "kind": "completion"}) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[limits.defualt]\nrequests = 1", "'limits.defualt' is not known; did you mean 'default'?"),
        ("[limits.keys.k1]\ntokns = 1", "'limits.keys.k1.tokns' is not known; did you mean 'tokens'?"),
        ("[limits.default]\ntokens = 0", "'limits.default.tokens' must be a whole number from 1, or inf for no limit"),
        ("[limits.default]\ntokens = true", "must be a whole number from 1, or inf for no limit, got True"),
        ("[limits.default]\nbytes = 1", "'limits.default.bytes' is not known; expected requests, tokens"),
        ("[limits.roles.usr]\ntokens = 1", "'limits.roles.usr' is not known; did you mean 'user'?"),
        ("limits = 3", "'limits' must be a table, got 3"),
        ("[limits", "cannot be read: "),
    ],
)
def test_a_policy_file_with_a_mistake_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_limits(str(path))
    assert message in str(caught.value)
    assert "FUSION_POLICY" in str(caught.value)


def test_what_is_said_of_a_key_goes_before_what_is_said_of_its_role_and_of_all(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(
        "[limits.default]\nrequests = 1\ntokens = 2\n[limits.roles.user]\ntokens = 3\nbuilds = 4\n"
        "[limits.keys.alice]\nbuilds = inf\n[limits.tenant]\nnames = 5\n[limits.tenants.acme]\nbytes = 6\n"
    )
    table = load_limits(str(path))
    assert table.find_key(ALICE) == {"requests": 1, "tokens": 3, "builds": float("inf")}
    assert table.find_key(Caller("bob", "user", "acme")) == {"requests": 1, "tokens": 3, "builds": 4}
    assert table.find_tenant("acme") == {"names": 5, "bytes": 6}
    assert table.find_tenant("") == {}
    assert load_limits("") == LimitTable()


def test_keys_of_a_tenant_are_one_client() -> None:
    def identify(caller: Caller) -> str:
        scope = {"type": "http", "client": ("10.0.0.1", 1), "headers": [], CALLER: caller}
        return identify_client(scope)

    assert identify(ALICE) == identify(Caller("bob", "deployer", "acme")) != identify(Caller("alice", "user", "other"))
    assert identify(Caller()) == "10.0.0.1"
    assert identify(Caller("bob")) == "key bob"
