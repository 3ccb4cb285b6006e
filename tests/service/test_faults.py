"""Faults on servers of their own: a missing seam, kills, and how they end."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.conftest import ENGINE, ROOT, Server, family, launch, stop, wait_ready

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


@pytest.fixture(scope="module")
def bare(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server whose workers have no seam, and which asks for one of two keys."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(NO_SEAM)
    process, url = launch(
        folder / "data",
        server.adapters["wide"].parent,
        folder / "log",
        PYTHONPATH=os.pathsep.join([str(folder), str(ROOT)]),
        VLLM_PLUGINS="",
        FUSION_ADAPTERS=f"wide={server.adapters['wide']},narrow={server.adapters['narrow']}",
        FUSION_ENGINE_ARGS=f"{ENGINE} --api-key first second",
    )
    try:
        wait_ready(process, url, folder / "log")
        yield url
    finally:
        stop(process)


def test_without_the_seam_the_server_builds_instead_of_mixing(server: Server, bare: str) -> None:
    mixing = httpx.get(f"{bare}/readyz").json()["mixing"]
    assert not mixing["proven"]
    assert "do not take effect" in mixing["reason"]
    body = {**CHAT, "model": "0.6*narrow + 0.4*wide"}
    built = httpx.post(f"{bare}/v1/chat/completions", json=body, headers=KEY, timeout=300)
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


def test_a_key_is_asked_for_before_anything_is_answered_or_built(bare: str) -> None:
    unseen = {**CHAT, "model": "0.3*narrow + 0.7*wide"}
    with httpx.Client(base_url=bare, timeout=300) as http:
        before = builds(http)
        for method, path, body in (
            ("POST", "/v1/chat/completions", unseen),
            ("POST", "/tokenize", {"model": unseen["model"], "prompt": "a"}),
            ("GET", "/v1/models", None),
            ("POST", "/v1/adapters", {"name": "more", "path": "wide"}),
            ("DELETE", "/v1/adapters/wide", None),
            ("PUT", "/v1/fusions/more", {"fusion": "1*wide"}),
            ("POST", "/v1/load_lora_adapter", {"lora_name": "more", "lora_path": "wide"}),
        ):
            for headers in ({}, {"authorization": "Bearer third"}, {"authorization": "Basic second"}):
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
    keyed = openai.OpenAI(base_url=f"{bare}/v1", api_key="first", max_retries=0)
    assert {"wide", "narrow"} <= {model.id for model in keyed.models.list()}
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{bare}/v1", api_key="none", max_retries=0).models.list()


def test_a_killed_server_comes_back_with_all_it_promised_and_drains_on_term(server: Server, tmp_path: Path) -> None:
    log, roots = tmp_path / "log", server.adapters["wide"].parent
    first, url = launch(tmp_path / "data", roots, log, FUSION_MIXED="off")
    try:
        wait_ready(first, url, log)
        assert httpx.get(f"{url}/readyz").json()["mixing"]["reason"] == "switched off by FUSION_MIXED=off"
        with httpx.Client(base_url=url, timeout=300) as http:
            for name in ("wide", "narrow"):
                path = str(server.adapters[name])
                assert http.post("/v1/adapters", json={"name": name, "path": path}).status_code == 201
            assert http.put("/v1/fusions/kept", json={"fusion": "0.6*narrow + 0.4*wide"}).status_code == 201
            before = http.post("/v1/chat/completions", json={**CHAT, "model": "kept"})
            assert before.headers["x-fusion-mode"] == "built"
        with pytest.raises(httpx.TimeoutException):  # a build is under way when the kill comes
            body = {**CHAT, "model": "svd(1*wide + 1*narrow, rank=3)"}
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.05)
        everyone = family(first.pid)
        server_pid = next(pid for pid in everyone if b"worker.service" in Path(f"/proc/{pid}/cmdline").read_bytes())
        for pid in everyone[: everyone.index(server_pid) + 1]:  # the engine below must notice by itself
            os.kill(pid, signal.SIGKILL)
        wait_until_gone(everyone)
    finally:
        stop(first)
    second, url = launch(tmp_path / "data", roots, log, VLLM_PLUGINS="nothing", FUSION_STOP_TIMEOUT_S="90")
    try:
        wait_ready(second, url, log)
        with httpx.Client(base_url=url, timeout=300) as http:
            after = http.post("/v1/chat/completions", json={**CHAT, "model": "kept"})
            assert after.headers["x-fusion-mode"] == "mixed"
            assert after.headers["x-fusion-digest"] == before.headers["x-fusion-digest"]
            assert after.json()["choices"][0]["message"] == before.json()["choices"][0]["message"]
            # Half a request, and away: it must not hold up the end.
            address = httpx.URL(url)
            with socket.create_connection((address.host, address.port or 80)) as gone:
                head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
                gone.sendall(head + b"content-length: 100\r\n\r\n{")
            stream = {**CHAT, "model": "kept", "max_tokens": 80, "stream": True, "ignore_eos": True}
            with http.stream("POST", "/v1/chat/completions", json=stream) as answer:
                lines = answer.iter_lines()
                next(lines)
                second.send_signal(signal.SIGTERM)
                chunks = [line for line in lines if line]
                assert chunks[-1] == "data: [DONE]"
                assert any('"finish_reason":"length"' in chunk for chunk in chunks), "it was cut short"
        everyone = family(second.pid)
        assert second.wait(100) == 0
        wait_until_gone(everyone)
    finally:
        stop(second)


def test_a_failed_start_ends_with_its_reason(server: Server, tmp_path: Path) -> None:
    roots = server.adapters["wide"].parent
    sharded = launch(tmp_path / "data", roots, tmp_path / "log", FUSION_ENGINE_ARGS=f"{ENGINE} --fully-sharded-loras")
    shared = launch(server.data, roots, tmp_path / "other")
    for (process, _), log, words in (
        (sharded, tmp_path / "log", "--fully-sharded-loras cannot be combined with mixing"),
        (shared, tmp_path / "other", "another server uses the data folder"),
    ):
        assert process.wait(200) == 1
        last = [line for line in log.read_text().splitlines() if line.startswith("error: ")][-1]
        assert words in last


def wait_until_gone(pids: list[int]) -> None:
    """Fails when one of them runs longer than it takes to notice an end."""
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if family(pid)]:
        assert time.monotonic() < deadline, f"processes are left behind: {left}"
        time.sleep(0.2)
