"""Faults on servers of their own: a missing seam, kills, and how they end. The tests are steps of two servers' lives.

The first server has no seam, and is killed; the second comes back on its data, loses its engine, and ends on SIGTERM.
"""

import os
import shutil
import signal
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from service.callers import ROLES
from tests.conftest import BASE_NAME, ENGINE, Server, family, stop, wait_ready
from tests.service.own import HASTY, MARGIN_S, Own, wait

CHAT = {"messages": [{"role": "user", "content": "Count to ten."}], "max_tokens": 2, "temperature": 0}
# Stands in for a vLLM that changed under us: the worker says it has the seam and has not.
NO_SEAM = """
import sys, importlib.abc
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "service.engine.worker":
            import service.engine.seam as seam
            seam.install = lambda: None
        return None
sys.meta_path.insert(0, Finder())
"""
KEY = {"authorization": "Bearer second"}
SERIES = 'fusion_stack_requests{kind="stack"} 1.0'
PROFILE = "0.6*narrow + 0.4*stable"


@pytest.fixture(scope="module")
def folder() -> Iterator[Callable[[], Path]]:
    """Makes folders of short names."""
    folders: list[Path] = []

    def make() -> Path:
        folders.append(Path(tempfile.mkdtemp(prefix="own")))
        return folders[-1]

    yield make
    for made in folders:
        shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def bare(server: Server, folder: Callable[[], Path]) -> Iterator[Own]:
    """A server whose workers have no seam, and which asks for one of two keys."""
    own = Own(
        folder(),
        site=NO_SEAM,
        VLLM_PLUGINS="",
        FUSION_ADAPTER_ROOTS=str(server.adapters["wide"].parent),
        FUSION_ADAPTERS=f"wide={server.adapters['wide']},narrow={server.adapters['narrow']}",
        FUSION_ENGINE_ARGS=f"{ENGINE} --api-key first second",
        FUSION_LOOP_TIMEOUT_S="30",
    )
    try:
        wait_ready(own.process, own.url, own.log)
        yield own
    finally:
        stop(own.process)


def test_without_the_seam_the_server_builds_instead_of_mixing(server: Server, bare: Own) -> None:
    mixing = bare.readiness()["mixing"]
    assert not mixing["proven"]
    assert "do not take effect" in mixing["reason"]
    body = {**CHAT, "model": "0.6*narrow + 0.4*wide"}
    built = httpx.post(f"{bare.url}/v1/chat/completions", json=body, headers=KEY, timeout=300)
    assert built.headers["x-fusion-mode"] == "built"
    with server.http() as http:
        mixed = http.post("/v1/chat/completions", json=body)
    assert mixed.headers["x-fusion-mode"] == "mixed"
    assert built.json()["choices"][0]["message"] == mixed.json()["choices"][0]["message"]


def builds(http: httpx.Client) -> list[str]:
    """The lines of /metrics that count builds."""
    return [
        line for line in http.get("/metrics", headers=KEY).text.splitlines() if line.startswith("fusion_builds_total")
    ]


def test_a_key_is_asked_for_before_anything_is_answered_or_built(bare: Own) -> None:
    unseen = {**CHAT, "model": "0.3*narrow + 0.7*wide"}
    with httpx.Client(base_url=bare.url, timeout=300) as http:
        before = builds(http)
        wrong = ({"authorization": "Bearer third"}, {"authorization": "Basic second"})  # ten a minute would be too many
        asks = (
            ("POST", "/v1/chat/completions", unseen),
            ("POST", "/tokenize", {"model": unseen["model"], "prompt": "a"}),
            ("GET", "/v1/models", None),
            ("POST", "/v1/adapters", {"name": "more", "path": "wide"}),
            ("DELETE", "/v1/adapters/wide", None),
            ("PUT", "/v1/fusions/more", {"fusion": "1*wide"}),
            ("POST", "/v1/load_lora_adapter", {"lora_name": "more", "lora_path": "wide"}),
        )
        for i, (method, path, body) in enumerate(asks):
            for headers in ({}, wrong[i % 2]):
                answer = http.request(method, path, json=body, headers=headers)
                assert answer.status_code == 401, path
                assert "Authorization: Bearer KEY" in answer.json()["error"]["message"]
        assert builds(http) == before
        assert http.get("/v1/adapters/wide", headers=KEY).status_code == 200
        for path in ("/livez", "/readyz", "/health"):
            assert http.get(path).status_code == 200
        assert http.get("/metrics").status_code == 401
        profile = {"fusion": "wide", "defaults": {"max_tokens": 10**9}}  # D1: vLLM asks for the key, too
        refusal = http.put("/v1/fusions/tried", json=profile, headers=KEY)
        assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, "defaults.max_tokens")
    keyed = openai.OpenAI(base_url=f"{bare.url}/v1", api_key="first", max_retries=0)
    assert {"wide", "narrow"} <= {model.id for model in keyed.models.list()}
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{bare.url}/v1", api_key="none", max_retries=0).models.list()


def test_keys_of_the_registry_open_what_their_role_says(bare: Own) -> None:
    with httpx.Client(base_url=bare.url, timeout=300) as http:
        made = {role: http.post("/v1/keys", json={"role": role}, headers=KEY).json() for role in ROLES}
        user, deployer, admin = ({"authorization": f"Bearer {made[role]['key']}"} for role in ROLES)
        assert http.get("/readyz").json()["access"] == {"keys": True, "loopback_only": False}
        message = {"model": BASE_NAME, "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
        for headers in (user, deployer, admin, {"x-api-key": made["user"]["key"]}):
            assert http.post("/v1/messages", json=message, headers=headers).status_code == 200  # vLLM knows no such key
        for method, path, least in (
            ("PUT", "/v1/fusions/tried", deployer),
            ("DELETE", "/v1/fusions/tried", deployer),
            ("GET", "/v1/audit", admin),
            ("GET", "/metrics", admin),
            ("GET", "/load", admin),
        ):
            profile = {"fusion": "wide", "defaults": {"max_tokens": 7}} if method == "PUT" else None
            for headers in (user, deployer, admin)[: (user, deployer, admin).index(least)]:
                assert http.request(method, path, json=profile, headers=headers).status_code == 403
            assert http.request(method, path, json=profile, headers=least).is_success
        assert http.delete(f"/v1/keys/{made['user']['id']}", headers=admin).status_code == 204
        assert http.get("/v1/models", headers=user).status_code == 401
        last = http.get("/v1/audit", headers=admin).json()["data"][-2]["entry"]
        assert (last["action"], last["by"]["key"]) == ("profile.remove", made["deployer"]["id"])
    log = bare.log.read_text() + (bare.data / "audit.jsonl").read_text()
    assert not [key["id"] for key in made.values() if key["key"][16:] in log]


@dataclass(frozen=True)
class Returned:
    """The server that came back, and what the killed one answered for its profile "kept"."""

    own: Own
    before: httpx.Response


def promise_and_die(bare: Own, server: Server) -> httpx.Response:
    """Have the server register and answer, then kill it during a build; the answer."""
    with httpx.Client(base_url=bare.url, timeout=300, headers=KEY) as http:
        added = http.post("/v1/adapters", json={"name": "stable", "path": str(server.adapters["stable"])})
        assert added.status_code == 201, added.text
        assert http.put("/v1/fusions/kept", json={"fusion": PROFILE}).status_code == 201
        answer = http.post("/v1/chat/completions", json={**CHAT, "model": "kept"})
        assert answer.headers["x-fusion-mode"] == "built"
        with pytest.raises(httpx.TimeoutException):  # a build is under way when the kill comes
            body = {**CHAT, "model": "svd(1*stable + 1*narrow, rank=3)"}
            http.post("/v1/chat/completions", json=body, timeout=0.05)
    everyone = family(bare.process.pid)
    for pid in everyone[: everyone.index(bare.worker) + 1]:  # the engine below must notice by itself
        os.kill(pid, signal.SIGKILL)
    wait(lambda: not [pid for pid in everyone if family(pid)], 30)
    return answer


@pytest.fixture(scope="module")
def returned(server: Server, bare: Own, folder: Callable[[], Path]) -> Iterator[Returned]:
    before = promise_and_die(bare, server)
    with closing(sqlite3.connect(bare.data / "registry.sqlite")) as connection, connection:
        connection.execute("DELETE FROM keys")  # the second server is asked without
    own = Own(
        folder(),
        data=bare.data,
        VLLM_PLUGINS="nothing",
        FUSION_ADAPTER_ROOTS=str(server.adapters["wide"].parent),
        FUSION_LOOP_TIMEOUT_S="30",
        FUSION_STOP_TIMEOUT_S="90",
    )
    try:
        wait(lambda: own.readiness().get("state") == "starting", 100)
        own.wait_ready()
        yield Returned(own, before)
    finally:
        stop(own.process)


def complete(own: Own, answers: list[Any], tokens: int) -> None:
    body = {"model": "0.5*narrow", "prompt": "a", "max_tokens": tokens, "ignore_eos": True}
    try:
        answers.append(httpx.post(f"{own.url}/v1/completions", json=body, timeout=120).status_code)
    except httpx.HTTPError as error:
        answers.append(error)


def assert_refused_at_once(own: Own) -> None:
    for path in ("/v1/models", "/version"):
        began = time.monotonic()
        refused = own.get(path)
        assert time.monotonic() - began < 5
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "ServiceUnavailableError")
        assert int(refused.headers["retry-after"]) > 0
    assert own.status("/livez") == 200
    assert own.readiness()["state"] == "restarting"


def test_a_killed_engine_is_replaced_in_the_same_worker(returned: Returned) -> None:
    own = returned.own
    worker, core, answers = own.worker, own.core, list[Any]()
    running = threading.Thread(target=complete, args=(own, answers, 1500))
    running.start()
    wait(lambda: SERIES in own.get("/metrics").text, MARGIN_S)
    os.kill(core, signal.SIGKILL)
    wait(lambda: own.status("/readyz") == 503, MARGIN_S)
    assert_refused_at_once(own)
    running.join(MARGIN_S)
    assert not running.is_alive()
    assert answers != [200]
    wait(lambda: "attempt 2 of 3" in own.readiness().get("reason", ""), MARGIN_S)
    own.wait_ready()
    assert own.worker == worker
    assert own.core != core
    assert SERIES not in own.get("/metrics").text, "the lease is given back"
    complete(own, answers, 2)
    assert answers[1:] == [200]


def test_a_killed_server_comes_back_with_all_it_promised_and_drains_on_term(returned: Returned) -> None:
    own, before = returned.own, returned.before
    assert own.worker, "its process is seen before it ends"
    with httpx.Client(base_url=own.url, timeout=300) as http:
        after = http.post("/v1/chat/completions", json={**CHAT, "model": "kept"})
        assert after.headers["x-fusion-mode"] == "mixed"
        assert after.headers["x-fusion-digest"] == before.headers["x-fusion-digest"]
        assert after.json()["choices"][0]["message"] == before.json()["choices"][0]["message"]
        # Half a request, and away: it must not hold up the end.
        address = httpx.URL(own.url)
        with socket.create_connection((address.host, address.port or 80)) as gone:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            gone.sendall(head + b"content-length: 100\r\n\r\n{")
        stream = {**CHAT, "model": "kept", "max_tokens": 80, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/chat/completions", json=stream) as answer:
            lines = answer.iter_lines()
            next(lines)
            own.process.send_signal(signal.SIGTERM)
            chunks = [line for line in lines if line]
            assert chunks[-1] == "data: [DONE]"
            assert any('"finish_reason":"length"' in chunk for chunk in chunks), "it was cut short"
    assert own.process.wait(100) == 0
    own.assert_gone()
    assert not list(own.scratch.iterdir())


def test_a_failed_start_ends_with_its_reason(server: Server, folder: Callable[[], Path]) -> None:
    own = Own(folder(), site=HASTY, data=server.data)
    try:
        assert "another server uses the data folder" in own.error()
    finally:
        stop(own.process)


@pytest.mark.soak
def test_a_server_that_is_not_to_mix_builds(server: Server, folder: Callable[[], Path]) -> None:
    adapters = ",".join(f"{name}={server.adapters[name]}" for name in ("narrow", "stable"))
    roots = str(server.adapters["wide"].parent)
    own = Own(folder(), FUSION_MIXED="off", FUSION_ADAPTERS=adapters, FUSION_ADAPTER_ROOTS=roots)
    try:
        wait_ready(own.process, own.url, own.log)
        assert own.readiness()["mixing"]["reason"] == "switched off by FUSION_MIXED=off"
        answer = httpx.post(f"{own.url}/v1/chat/completions", json={**CHAT, "model": PROFILE}, timeout=300)
        assert answer.headers["x-fusion-mode"] == "built"
    finally:
        stop(own.process)
