"""Two replicas behind HAProxy, which hashes stack keys; one is restarted under load: `make soak`, docs/fleet.md."""

import itertools
import json
import random
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.servers import free_port
from tests.conftest import BASE_NAME, ROOT, base_model, launch, make_adapters, stop, wait_ready
from tests.service.reference import PeftReference, token_ids

pytestmark = pytest.mark.soak
RESULT = ROOT / "benchmarks/results/fleet-soak.json"
REQUESTS, RECIPES, CLIENTS, DRAIN_S = 2000, 50, 12, 6
RESTART_AT, LAST = REQUESTS // 4, REQUESTS // 10
"""The replica is stopped after so many requests, and is back before so many last ones."""
CONFIG = """
defaults
    mode http
    timeout connect 2s
    timeout client 300s
    timeout server 300s
    option redispatch
    retries 3
frontend clients
    bind 127.0.0.1:{front}
    default_backend replicas
backend replicas
    balance hdr(X-Session-Id)
    hash-type consistent
    option httpchk GET /health
    server one 127.0.0.1:{one} check inter 1s fall 2 rise 1
    server two 127.0.0.1:{two} check inter 1s fall 2 rise 1
"""


@dataclass
class Fleet:
    """Two replicas and the router before them."""

    folder: Path
    adapters: dict[str, Path]
    ports: tuple[int, int, int] = field(default_factory=lambda: (free_port(), free_port(), free_port()))
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[2]}"

    def start(self, i: int) -> subprocess.Popen[bytes]:
        """Start replica `i`, on its port and with its data, and return once it is ready."""
        log = self.folder / f"log-{i}-{len(self.processes)}"
        process, _ = launch(
            self.folder / f"data-{i}",
            self.folder / "adapters",
            log,
            FUSION_PORT=str(self.ports[i]),
            FUSION_ADAPTERS=",".join(f"{name}={path}" for name, path in self.adapters.items()),
            FUSION_DRAIN_S=str(DRAIN_S),
            VLLM_CPU_KVCACHE_SPACE="1",
        )
        self.processes.append(process)
        wait_ready(process, f"http://127.0.0.1:{self.ports[i]}", log)
        return process

    def route(self) -> None:
        """Start HAProxy."""
        program = shutil.which("haproxy")
        assert program, "this test needs HAProxy: apt-get install haproxy"
        one, two, front = self.ports
        config = self.folder / "haproxy.cfg"
        config.write_text(CONFIG.format(front=front, one=one, two=two))
        self.processes.append(subprocess.Popen([program, "-db", "-f", str(config)]))


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, make_adapters(tmp_path / "adapters"))
    try:
        for i in (0, 1):
            fleet.start(i)
        fleet.route()
        yield fleet
    finally:
        for process in reversed(fleet.processes):
            stop(process)


def make_recipes(names: list[str]) -> list[str]:
    """Recipes over every set of one to three of the adapters, in turn."""
    draw, sets = random.Random(0), [s for n in (1, 2, 3) for s in itertools.combinations(names, n)]
    chosen = itertools.islice(itertools.cycle(sets), RECIPES)
    return [" + ".join(f"{draw.uniform(0.2, 1):.4f}*{name}" for name in one) for one in chosen]


@dataclass
class Load:
    """What clients have sent and got."""

    url: str
    recipes: list[str]
    prompts: list[list[int]]
    stacks: dict[str, str] = field(default_factory=dict)
    answers: list[tuple[int, str, float]] = field(default_factory=list)
    """Recipe, first token and its log-probability."""
    lost: list[str] = field(default_factory=list)
    cut: int = 0
    """Streams that had begun and did not end."""
    sources: Counter[str] = field(default_factory=Counter)

    def ask(self, http: httpx.Client, number: int) -> None:
        """Send one request, every tenth as a stream of some tokens."""
        i, is_stream = number % RECIPES, number % 10 == 3
        model = self.recipes[i]
        body = {"model": model, "prompt": self.prompts[i], "temperature": 0, "logprobs": 1, "stream": is_stream}
        body |= {"max_tokens": 16 if is_stream else 1, "ignore_eos": True}
        has_begun, is_whole = False, not is_stream
        try:
            headers = {"x-session-id": self.stacks.get(model, "none-yet")}
            with http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
                if answer.status_code != 200:
                    self.lost.append(f"{answer.status_code} {answer.read()[:200]!r}")
                    return
                self.stacks[model] = answer.headers["x-fusion-stack"]
                self.sources[answer.headers["x-fusion-source"]] += 1
                for line in answer.iter_lines():
                    text = line.removeprefix("data: ")
                    assert not text.startswith('{"error"'), text
                    is_whole = is_whole or text == "[DONE]"
                    if text.startswith("{") and not has_begun:
                        has_begun = True
                        found = json.loads(text)["choices"][0]["logprobs"]
                        self.answers.append((i, found["tokens"][0], found["token_logprobs"][0]))
            assert is_whole
        except (httpx.HTTPError, AssertionError) as error:
            if is_stream and has_begun:
                self.cut += 1
            else:
                self.lost.append(repr(error))


def find_wrong(load: Load, reference: PeftReference) -> tuple[int, float]:
    """Answers whose log-probability is not that of their recipe's likeliest token, and the largest difference."""
    largest = [max_log_probability(reference, load.prompts[i], recipe) for i, recipe in enumerate(load.recipes)]
    differences = [abs(largest[i] - value) for i, _, value in load.answers]
    return sum(difference > 1e-3 for difference in differences), max(differences)


def max_log_probability(reference: PeftReference, ids: list[int], recipe: str) -> float:
    """Of the likeliest token after `ids`."""
    import torch

    reference.log_probabilities(ids, recipe)  # which sets the weights
    with torch.inference_mode():
        logits: Any = reference.model(torch.tensor([ids])).logits
    return float(logits[0, -1].float().log_softmax(-1).max())


def test_a_restart_under_load_loses_nothing(fleet: Fleet) -> None:
    recipes = make_recipes(sorted(fleet.adapters))
    prompts = [token_ids(f"Number {i}: tell me about rivers and bread.") for i in range(RECIPES)]
    load, began, down_s = Load(fleet.url, recipes, prompts), time.monotonic(), list[float]()

    def restart() -> None:
        stopped = time.monotonic()
        stop(fleet.processes[1])
        fleet.start(1)
        down_s.append(time.monotonic() - stopped)

    thread = threading.Thread(target=restart)
    limits = httpx.Limits(max_connections=CLIENTS)
    with httpx.Client(base_url=fleet.url, timeout=300, limits=limits) as http, ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda n: load.ask(http, n), range(RESTART_AT)))
        thread.start()
        list(pool.map(lambda n: load.ask(http, n), range(RESTART_AT, REQUESTS - LAST)))
        thread.join()
        list(pool.map(lambda n: load.ask(http, n), range(REQUESTS - LAST, REQUESTS)))
    seconds = time.monotonic() - began
    wrong, difference = find_wrong(load, PeftReference(base_model(), fleet.adapters))
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": "make soak",
        "router": subprocess.run(["haproxy", "-v"], capture_output=True, text=True).stdout.splitlines()[0],
        "base": f"{BASE_NAME}, float32",
        "requests": REQUESTS,
        "recipes": RECIPES,
        "stacks": len(set(load.stacks.values())),
        "seconds": round(seconds),
        "replica_away_s": round(down_s[0]),
        "wrong": wrong,
        "largest_difference": difference,
        "lost": len(load.lost),
        "streams_cut": load.cut,
        "sources": dict(load.sources),
    }
    print(result, load.lost[:5], flush=True)
    assert len(down_s) == 1
    assert not load.lost
    assert not load.cut, "the server gives streams time to end"
    assert not wrong
    assert len(load.answers) == REQUESTS
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
