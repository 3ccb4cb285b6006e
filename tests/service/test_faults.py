"""Faults on servers of their own: a missing seam, kills, and how they end."""

import os
import signal
import time
from pathlib import Path

import httpx
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


def test_without_the_seam_the_server_builds_instead_of_mixing(server: Server, tmp_path: Path) -> None:
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(NO_SEAM)
    log = tmp_path / "log"
    roots = server.adapters["wide"].parent
    path = os.pathsep.join([str(tmp_path / "fault"), str(ROOT)])
    process, url = launch(
        tmp_path / "data",
        roots,
        log,
        PYTHONPATH=path,
        VLLM_PLUGINS="",
        FUSION_ADAPTERS=f"wide={server.adapters['wide']},narrow={server.adapters['narrow']}",
    )
    try:
        wait_ready(process, url, log)
        mixing = httpx.get(f"{url}/readyz").json()["mixing"]
        assert not mixing["proven"]
        assert "do not take effect" in mixing["reason"]
        body = {**CHAT, "model": "0.6*narrow + 0.4*wide"}
        built = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)
        assert built.headers["x-fusion-mode"] == "built"
        with server.http() as http:
            mixed = http.post("/v1/chat/completions", json=body)
        assert mixed.headers["x-fusion-mode"] == "mixed"
        assert built.json()["choices"][0]["message"] == mixed.json()["choices"][0]["message"]
    finally:
        stop(process)


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
        wait_for_the_end_of(everyone)
    finally:
        stop(first)
    second, url = launch(tmp_path / "data", roots, log, VLLM_PLUGINS="nothing")
    try:
        wait_ready(second, url, log)
        with httpx.Client(base_url=url, timeout=300) as http:
            after = http.post("/v1/chat/completions", json={**CHAT, "model": "kept"})
            assert after.headers["x-fusion-mode"] == "mixed"
            assert after.headers["x-fusion-digest"] == before.headers["x-fusion-digest"]
            assert after.json()["choices"][0]["message"] == before.json()["choices"][0]["message"]
            stream = {**CHAT, "model": "kept", "max_tokens": 80, "stream": True, "ignore_eos": True}
            with http.stream("POST", "/v1/chat/completions", json=stream) as answer:
                lines = answer.iter_lines()
                next(lines)
                second.send_signal(signal.SIGTERM)
                assert [line for line in lines if line][-1] == "data: [DONE]"
        everyone = family(second.pid)
        assert second.wait(60) == 0
        wait_for_the_end_of(everyone)
    finally:
        stop(second)


def test_a_start_that_cannot_be_ends_with_its_reason(server: Server, tmp_path: Path) -> None:
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


def wait_for_the_end_of(pids: list[int]) -> None:
    """Fails when one of them runs longer than it takes to notice an end."""
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if family(pid)]:
        assert time.monotonic() < deadline, f"processes are left behind: {left}"
        time.sleep(0.2)
