"""Replicas on Ray Serve: scaled up under load, one killed, a profile switched: `make soak`, docs/ray.md."""

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import BASE_NAME, ROOT, base_model, family, launch, make_adapters, stop, wait_ready
from tests.service.databases import run_postgres
from tests.service.own import wait
from tests.service.reference import PeftReference, token_ids
from tests.service.test_fleet_soak import CLIENTS, RECIPES, Load, find_wrong, make_recipes

pytestmark = pytest.mark.soak
RESULT = ROOT / "benchmarks/results/ray-serve.json"
REQUESTS, KILL_AT, ENGINE_KILL = 300, 100, 50
"""While two replicas run, one is killed after so many of them; so many more follow after an engine was killed."""
ACTOR, CORE = "ServeReplica:lora-fusion:Fusion", "EngineCore"
SCALE_S, SWITCH_S, MARGIN_S = 400, 2.0, 30.0
ASKED = 20
"""Requests after a switch, which reach both replicas."""


@dataclass
class Fleet:
    """What `lora-fusion serve-ray` runs."""

    url: str
    adapters: dict[str, Path]
    pid: int

    def find(self, name: str) -> list[int]:
        """The running processes that have `name` in their command."""
        found = []
        for pid in family(self.pid):
            with suppress(OSError):
                if name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: sockets lie in it
    adapters = make_adapters(folder / "adapters")
    with run_postgres() as postgres:
        scale = ["--min-replicas", "1", "--max-replicas", "2", "--target-ongoing", "4"]
        process, url = launch(
            folder / "data",
            folder / "adapters",
            folder / "log",
            command=["-m", "lora_fusion", "serve-ray", *scale],
            FUSION_DATABASE=postgres.url,
            FUSION_STORE=str(folder / "shared"),
            FUSION_ADAPTERS=",".join(f"{name}={path}" for name, path in adapters.items()),
            FUSION_STOP_TIMEOUT_S="10",
            VLLM_CPU_KVCACHE_SPACE="1",
            TMPDIR=str(folder),
            RAY_TMPDIR=str(folder),
        )
        try:
            wait_ready(process, url, folder / "log")
            yield Fleet(url, adapters, process.pid)
        finally:
            everyone = family(process.pid)
            stop(process)
            _, left = psutil.wait_procs([psutil.Process(pid) for pid in everyone if psutil.pid_exists(pid)], MARGIN_S)
            for process_left in left:
                process_left.kill()
    shutil.rmtree(folder, ignore_errors=True)
    assert not left


def scale_up(fleet: Fleet, load: Load, http: httpx.Client) -> float:
    """Ask until a second replica has started; seconds."""
    began, number = time.monotonic(), 0
    with ThreadPoolExecutor(CLIENTS) as pool:
        while len(ready_servers(fleet)) < 2:
            assert time.monotonic() - began < SCALE_S
            list(pool.map(lambda n: load.ask(http, n), range(number, number + CLIENTS)))
            number += CLIENTS
    return time.monotonic() - began


def ready_servers(fleet: Fleet) -> list[str]:
    """The addresses of the replicas' own servers that are ready."""
    ready = []
    for pid in fleet.find("-m\0service\0"):
        with suppress(OSError, httpx.HTTPError):
            settings = dict(line.split("=", 1) for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if line)
            url = f"http://127.0.0.1:{settings['FUSION_PORT']}"
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                ready.append(url)
    return sorted(set(ready))


def assert_on_loopback(fleet: Fleet) -> None:
    """Nothing of it listens on another address."""
    members = set(family(fleet.pid))
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in members]
    assert listening
    assert {c.laddr.ip for c in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening


def switch(fleet: Fleet, http: httpx.Client) -> float:
    """Change a profile; seconds until all answers are by its new version."""
    http.put("/v1/fusions/p", json={"fusion": "0.5*wide"}).raise_for_status()
    time.sleep(SWITCH_S)
    began = time.monotonic()
    digest = http.put("/v1/fusions/p", json={"fusion": "0.5*narrow"}).raise_for_status().json()["digest"]
    last = began
    while time.monotonic() - began < SWITCH_S + 1:
        for url in ready_servers(fleet):
            if httpx.get(f"{url}/v1/models/p", timeout=10).json()["fusion"]["digest"] != digest:
                last = time.monotonic()
    body = {"model": "p", "prompt": "The", "max_tokens": 1}
    found = {http.post("/v1/completions", json=body).headers["x-fusion-digest"] for _ in range(ASKED)}
    assert found == {digest}
    return last - began


def count_running(fleet: Fleet) -> float:
    """Requests in the engines."""
    lines = [line for url in ready_servers(fleet) for line in httpx.get(f"{url}/metrics").text.splitlines()]
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))


def leave(fleet: Fleet, http: httpx.Client) -> None:
    """Go away in the middle of a stream, and before an answer has begun: the engines stop working on both."""
    body = {"model": "wide", "prompt": "The", "max_tokens": 1900, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = answer.iter_lines()  # the stream ends with it
        next(lines)
        wait(lambda: count_running(fleet) == 1, MARGIN_S)
    wait(lambda: count_running(fleet) == 0, MARGIN_S)
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=2)
    wait(lambda: count_running(fleet) == 0, MARGIN_S)


def test_a_killed_replica_costs_only_the_streams_it_was_in(fleet: Fleet) -> None:
    recipes = make_recipes(sorted(fleet.adapters))
    prompts = [token_ids(f"Number {i}: tell me about rivers and bread.") for i in range(RECIPES)]
    load, began = Load(fleet.url, recipes, prompts), time.monotonic()
    assert_on_loopback(fleet)
    limits = httpx.Limits(max_connections=CLIENTS + 1)
    with httpx.Client(base_url=fleet.url, timeout=300, limits=limits) as http:
        scaled_s = scale_up(fleet, load, http)
        switched_s = switch(fleet, http)
        leave(fleet, http)
        load.sources.clear()
        asked = len(load.answers)
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda n: load.ask(http, n), range(KILL_AT)))
            before = dict(load.sources)
            killed = threading.Timer(0.5, os.kill, (fleet.find(ACTOR)[0], signal.SIGKILL))
            killed.start()
            list(pool.map(lambda n: load.ask(http, n), range(KILL_AT, REQUESTS)))
        killed.join()
        wait(lambda: len(ready_servers(fleet)) == 2, SCALE_S)
        os.kill(fleet.find(CORE)[0], signal.SIGKILL)
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda n: load.ask(http, n), range(ENGINE_KILL)))
    seconds = time.monotonic() - began
    wrong, difference = find_wrong(load, PeftReference(base_model(), fleet.adapters))
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": "pytest -m soak tests/service/test_ray_serve.py",
        "ray": version("ray"),
        "base": f"{BASE_NAME}, float32",
        "requests": REQUESTS + ENGINE_KILL,
        "recipes": RECIPES,
        "stacks": len(set(load.stacks.values())),
        "seconds": round(seconds),
        "scaled_up_s": round(scaled_s),
        "switched_s": round(switched_s, 2),
        "sources_before_kill": before,
        "answered_while_scaling": asked,
        "wrong": wrong,
        "largest_difference": difference,
        "lost": len(load.lost),
        "streams_cut": load.cut,
    }
    print(result, load.lost[:5], flush=True)
    assert not load.lost
    assert load.cut <= CLIENTS
    assert not wrong
    assert len(load.answers) == asked + REQUESTS + ENGINE_KILL
    assert switched_s < SWITCH_S
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
