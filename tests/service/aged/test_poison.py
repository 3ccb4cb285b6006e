"""Adapters whose numbers overflow: uploads are refused, and those that an older version let in spoil nobody's answers.

The proof's server starts with a registry as an older version left it: adapters of huge numbers without a norm in their
records, so that neither registration nor the check of a mix can refuse them. Everybody's answers are then compared
with what the same requests gave alone, before anything was poisoned.
"""

import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from adapters import LoraAdapter, LoraModule, load, make_adapter, save
from adapters.files import adapter_path
from service.engine.overflow import MESSAGE
from tests.conftest import BASE_NAME, Server
from tests.service.aged.conftest import Aged, scale

TOLERANCE = 1e-4
ROUNDING = 2e-4
"""Between an answer alone and the same in large batches, which float32 rounds otherwise: 1.06e-4 was seen. What poison
leaves behind is NaN, or zeros in the place of numbers.
"""
WORDS = "rivers bread chess violins comets bees lighthouses glaciers copper ferries maps".split()  # noqa: SIM905 - words read better so
LENGTHS = (3, 5, 9, 20, 40, 80, 130, 200, 320)
"""Words in a prompt: from a part of one key-value block (128 tokens) to several."""
MODELS = (BASE_NAME, "task", "safety", "0.6*task + 0.4*safety", "0.3*task + -0.9*safety")
POISON = ("loud", "10000*high", "10000*task + 100*high", "huge", "svd(1*loud + 1*task, rank=8)")


def make_prompt(words: int, seed: int) -> str:
    draw = random.Random(f"{words}/{seed}")
    return " ".join(draw.choice(WORDS) for _ in range(words))


@dataclass
class Clients:
    """Sixteen at a time; every request computes all of its prompt (`cache_salt`)."""

    url: str
    http: httpx.Client
    salts: Iterator[int] = field(default_factory=count)

    def ask(self, model: str, prompt: str, **more: Any) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 3, "ignore_eos": True}
        return self.http.post("/v1/completions", json={**body, "cache_salt": f"salt-{next(self.salts)}", **more})

    def values(self, case: tuple[str, str]) -> list[float]:
        """Log-probabilities of a greedy answer."""
        answer = self.ask(*case)
        assert answer.status_code == 200, answer.text
        values: list[float] = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
        return values

    def poison(self, number: int) -> None:
        """One request whose numbers overflow; it must end with the error."""
        answer = self.ask(POISON[number % len(POISON)], make_prompt(LENGTHS[-1 - number % 7], number))
        check_error(answer)


@pytest.fixture
def clients(aged: Aged) -> Iterator[Clients]:
    with httpx.Client(base_url=aged.url, timeout=600, limits=httpx.Limits(max_connections=64)) as http:
        yield Clients(aged.url, http)


def check_error(answer: httpx.Response) -> None:
    """The error of an overflow, or of a build that would overflow."""
    error = answer.json()["error"]
    if error["message"].endswith("[overflow]"):
        assert (answer.status_code, error["type"]) == (400, "BadRequestError"), answer.text
    else:
        assert (answer.status_code, error["message"], error["type"]) == (500, MESSAGE, "InternalServerError")


def hold_against_poison(clients: Clients, rounds: int, prompts: int) -> float:
    """Largest difference between an answer alone and the same in a batch with poison, or after it; so many `prompts` of
    each length.
    """
    models = [MODELS[i % len(MODELS)] for i in range(prompts * len(LENGTHS))]
    cases = [(model, make_prompt(LENGTHS[i % len(LENGTHS)], i)) for i, model in enumerate(models)]
    alone = {case: clients.values(case) for case in cases}
    worst = 0.0

    def compare(values: list[float], case: tuple[str, str]) -> None:
        nonlocal worst
        worst = max(worst, *(abs(a - b) for a, b in zip(values, alone[case], strict=True)))

    with ThreadPoolExecutor(16) as pool:
        for round_ in range(rounds):
            batch = [pool.submit(clients.poison, 10 * round_ + i) for i in range(10)]
            answers = [(case, pool.submit(clients.values, case)) for case in cases]
            for poisoning in batch:
                poisoning.result()
            for case, values in answers:
                compare(values.result(), case)
            for case, values in [(case, pool.submit(clients.values, case)) for case in cases]:
                compare(values.result(), case)
    return worst


def test_answers_beside_and_after_poison_are_those_alone(clients: Clients) -> None:
    assert hold_against_poison(clients, rounds=1, prompts=1) < ROUNDING


@pytest.mark.soak
def test_hundreds_of_answers_beside_and_after_poison_are_those_alone(clients: Clients) -> None:
    assert hold_against_poison(clients, rounds=8, prompts=3) < ROUNDING


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": make_prompt(30, 1), "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": make_prompt(30, 2)}], "max_tokens": 4},
    "/v1/responses": {"input": make_prompt(30, 3), "max_output_tokens": 16},
    "/v1/messages": {"messages": [{"role": "user", "content": make_prompt(30, 4)}], "max_tokens": 4},
}


@pytest.mark.parametrize("path", BODIES)
def test_every_kind_of_answer_says_that_its_numbers_overflowed(path: str, clients: Clients) -> None:
    options: list[dict[str, Any]] = [{}, {"stream": True}, {"temperature": 1.0, "top_p": 0.5}]
    if "completions" in path:
        options += [{"n": 3}, {"n": 2, "stream": True}, {"prompt_logprobs": 1}]
        options += [{"logprobs": True, "top_logprobs": 2}] if "chat" in path else [{"logprobs": 2, "echo": True}]
    before = clients.http.get("/readyz").json()["nonfinite"]["requests"]
    for option in options:
        answer = clients.http.post(path, json={"model": "loud", **BODIES[path], **option})
        assert MESSAGE in answer.text, option
        assert answer.status_code == (200 if option.get("stream") else 500), option
    state = clients.http.get("/readyz")
    assert state.status_code == 200
    assert state.json()["nonfinite"]["requests"] == before + len(options)
    assert state.json()["nonfinite"]["last"]
    assert f"fusion_nonfinite_requests_total {before + len(options)}.0" in clients.http.get("/metrics").text


def test_an_overflow_in_the_middle_of_a_stream_ends_it_with_an_error(clients: Clients) -> None:
    """The long prompt is computed in two steps, of 512 tokens and the rest."""
    with clients.http.stream(
        "POST",
        "/v1/completions",
        json={"model": "loud", "prompt": make_prompt(700, 1), "max_tokens": 4, "stream": True},
    ) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert events[-1]["error"]["message"] == MESSAGE
    assert events[-1]["error"]["code"] == 500


def test_what_overflowed_is_not_in_the_prefix_cache(clients: Clients) -> None:
    """Asked again with the same prompt, nothing of it is found there."""

    def hits() -> float:
        lines = clients.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))

    prompt = make_prompt(300, 5)
    clients.values(("task", prompt))
    before = hits()
    for _ in range(3):
        check_error(clients.ask("loud", prompt, cache_salt="same"))
    assert hits() == before


@pytest.mark.parametrize(
    "option", [{}, {"temperature": 1.0, "seed": 3}, {"echo": True}, {"n": 2, "temperature": 1.0}, {"logprobs": None}]
)
def test_an_answer_whose_logits_alone_overflow_ends_with_the_error(option: dict[str, Any], clients: Clients) -> None:
    prompt = make_prompt(300, 6)
    alone = clients.values(("task", prompt))
    with ThreadPoolExecutor(4) as pool:
        loud = [pool.submit(clients.ask, "loud-head", prompt, **option) for _ in range(3)]
        beside = pool.submit(clients.values, ("task", prompt))
        for answer in loud:
            assert (answer.result().status_code, answer.result().json()["error"]["message"]) == (500, MESSAGE)
    assert max(abs(a - b) for a, b in zip(beside.result(), alone, strict=True)) < TOLERANCE


def test_only_tokens_that_an_answer_may_have_are_minus_infinity(clients: Clients) -> None:
    """Masks of tokens are no overflow."""
    masks: list[dict[str, Any]] = [
        {"allowed_token_ids": [504]},
        {"structured_outputs": {"choice": ["yes"]}},
        {"logit_bias": {"504": -100}, "min_tokens": 3, "bad_words": ["the"]},
    ]
    for mask in masks:
        answer = clients.ask("task", make_prompt(9, 7), **mask)
        assert answer.status_code == 200, answer.text


def archive(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, arcname=path.name)
    return buffer.getvalue()


def cancel(adapter: LoraAdapter, number: float) -> LoraAdapter:
    """Two coordinates of opposite sign: an update of zero, from huge numbers."""
    modules = {}
    for name, m in adapter.modules.items():
        b = m.b[:, :1] * number
        modules[name] = LoraModule(torch.cat([m.a[:1], m.a[:1]]), torch.cat([b, -b], dim=1), 1.0)
    return make_adapter(modules, BASE_NAME)


def with_scaling(adapter: LoraAdapter, scaling: float) -> LoraAdapter:
    modules = {name: LoraModule(m.a, m.b, scaling) for name, m in adapter.modules.items()}
    return make_adapter(modules, BASE_NAME)


REFUSED: dict[str, Callable[[LoraAdapter], LoraAdapter]] = {
    "float32-1e38": lambda task: scale(task, 1e37),
    "float32-1e20": lambda task: scale(task, 1e20),
    "float32-1e18": lambda task: scale(task, 1e18),
    "float64-1e300": lambda task: scale(task, 1e150, torch.float64),
    "alpha-1e30": lambda task: with_scaling(task, 1e30),
    "alpha-0": lambda task: with_scaling(task, 0.0),
    "cancels": lambda task: cancel(task, 1e36),
    "denormals": lambda task: scale(task, 1e-160, torch.float64),
    "over-the-limit": lambda task: with_scaling(task, 1e6),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_upload_that_overflows_or_does_nothing_is_refused_and_leaves_nothing(
    name: str, server: Server, tmp_path: Path
) -> None:
    save(REFUSED[name](load(adapter_path("shipped:task"))), tmp_path / "adapter")
    with server.http() as http:
        before = http.get("/v1/adapters").json()
        files = {"file": ("adapter.tar", archive(tmp_path / "adapter"))}
        answer = http.post("/v1/adapters", data={"name": name}, files=files, headers={"x-fusion-upload": "1"})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"].endswith(("[overflow]", "[no_effect]", "[bad_config]"))
        assert http.get("/v1/adapters").json() == before
    assert not [
        entry for entry in (server.data / "adapters").iterdir() if entry.stat().st_mtime > tmp_path.stat().st_mtime
    ]


def test_an_adapter_of_small_float64_numbers_is_served_like_its_float32_form(server: Server, tmp_path: Path) -> None:
    task = load(adapter_path("shipped:task"))
    values = []
    with server.http() as http:
        for name, dtype in (("narrow32", torch.float32), ("wide64", torch.float64)):
            save(scale(task, 1.0, dtype), tmp_path / name)
            files = {"file": ("adapter.tar", archive(tmp_path / name))}
            answer = http.post("/v1/adapters", data={"name": name}, files=files, headers={"x-fusion-upload": "1"})
            assert answer.status_code == 201, answer.text
            assert answer.json()["norm"] > 1
            body = {"prompt": make_prompt(20, 1), "max_tokens": 4, "temperature": 0, "logprobs": 1}
            answer = http.post("/v1/completions", json={"model": f"16*{name}", **body})
            values.append(answer.json()["choices"][0]["logprobs"]["token_logprobs"])
            assert http.delete(f"/v1/adapters/{name}").status_code == 204
    assert max(abs(a - b) for a, b in zip(*values, strict=True)) < TOLERANCE


def test_a_build_that_amplifies_beyond_the_dtype_is_a_400(clients: Clients) -> None:
    for recipe in (
        "dare_ties(10000*loud + 1*task, density=0.1)",
        "svd(10000*loud + 1*task, rank=4)",
        "ties(1*huge + 1*task, density=0.5)",
    ):
        answer = clients.ask(recipe, "a few words")
        assert answer.status_code == 400, answer.text
        assert "overflow" in answer.json()["error"]["message"]
