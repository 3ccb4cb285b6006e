"""Gates on the real engine: what they read, what they choose, and what is answered at those weights."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters import LoraModule, Readout, load, make_adapter, save
from tests.conftest import BASE_NAME, Server, base_model
from tests.service.reference import token_ids
from tests.service.test_exact import LONG, PROMPTS, TOLERANCE
from tests.service.test_function_recipes import PositionReference

YES, NO, SCALE, OFFSET = 2683, 1195, 0.7, 0.4
RECIPE = "gate(0.9*wide + 0.8*narrow, by=tilt, narrow in -0.4..1.2)"
ON_ANSWER = "gate(answer(0.9*wide + 0.8*narrow), by=tilt, narrow in -0.4..1.2)"


@pytest.fixture(scope="module")
def gate(server: Server) -> str:
    """A random gate in all modules of the base, registered."""
    draw = torch.Generator().manual_seed(1)
    shapes = {
        name: module.weight.shape
        for name, module in base_model().named_modules()
        if "self_attn" in name and name.endswith("_proj")
    }

    def make(rows: int, columns: int) -> LoraModule:
        a = torch.randn(1, columns, generator=draw) / columns**0.5
        return LoraModule(a, torch.randn(rows, 1, generator=draw) * 0.3, 1.0)

    adapter = make_adapter({name: make(*shape) for name, shape in shapes.items()}, BASE_NAME)
    path = server.adapters["wide"].parent / "tilt"
    save(replace(adapter, gate=Readout(YES, NO, SCALE, OFFSET)), path)
    assert load(path).digest != adapter.digest
    with server.http() as http:
        answer = http.post("/v1/adapters", json={"name": "tilt", "path": str(path)})
    assert answer.status_code == 201, answer.text
    assert f'"yes":{YES},' in answer.text
    assert answer.json()["gate"] == {"yes": YES, "no": NO, "scale": SCALE, "offset": OFFSET}
    return str(path)


@pytest.fixture(scope="module")
def reference(server: Server, gate: str) -> PositionReference:
    folders = {name: server.adapters[name] for name in ("narrow", "wide")}
    return PositionReference(base_model(), {**folders, "tilt": server.adapters["wide"].parent / "tilt"})


def read_gate(reference: PositionReference, ids: Sequence[int]) -> float:
    """The gate's value, in plain code: it acts at the prompt's last position alone."""
    yes, no = (
        reference.by_position([*ids, token], len(ids), lambda at, _: {"tilt": float(at == 0)})[-1]
        for token in (YES, NO)
    )
    return yes - no


def ask(server: Server, model: str, ids: Sequence[int]) -> tuple[Mapping[str, float], list[int], list[float]]:
    """The weights that the header tells, the answer's tokens and their log-probabilities."""
    raw = server.client.completions.with_raw_response.create(
        model=model,
        prompt=list(ids),
        max_tokens=5,
        temperature=0,
        logprobs=1,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    assert raw.headers["x-fusion-gate"] == "chose"
    assert raw.headers["x-fusion-mode"] == "mixed"
    choice = raw.parse().choices[0]
    assert choice.logprobs is not None
    values = list(choice.logprobs.token_logprobs or ())
    return json.loads(raw.headers["x-fusion-weights"]), list((choice.model_extra or {})["token_ids"])[-5:], values


def test_each_prompt_is_answered_at_the_weights_that_the_gate_chose(
    server: Server, reference: PositionReference
) -> None:
    lengths = (127, 128, 129, 130, 256, 700)  # around the borders of blocks, and of more than a step's 512 tokens
    prompts = [token_ids(prompt) for prompt in PROMPTS] + [token_ids(LONG)[i : i + n] for i, n in enumerate(lengths)]
    work: list[Any] = [(model, ids) for ids in prompts for model in (RECIPE, ON_ANSWER)]
    with ThreadPoolExecutor(len(work)) as pool:
        answers = list(pool.map(lambda one: ask(server, *one), work))
    chosen = set()
    for (model, ids), (weights, tokens, values) in zip(work, answers, strict=True):
        share = 1 / (1 + math.exp(-(SCALE * read_gate(reference, ids) + OFFSET)))
        assert weights["wide"] == 0.9
        assert weights["narrow"] == pytest.approx(-0.4 + 1.6 * share, abs=1e-3)
        chosen.add(weights["narrow"])

        def weigh(token: int, _: int, weights: Mapping[str, float] = weights, model: str = model) -> dict[str, float]:
            acts = model is RECIPE or token >= 0
            return {name: acts * weight for name, weight in weights.items()}

        expected = reference.by_position([*ids, *tokens], len(ids), weigh)[-5:]
        assert max(abs(a - b) for a, b in zip(expected, values, strict=True)) < TOLERANCE
    assert max(chosen) - min(chosen) > 0.05, "the gate must tell prompts apart for this to mean something"


def test_a_gate_around_an_answer_computes_one_more_token(server: Server, gate: str) -> None:
    """The rest of the prompt is the gate's; usage has it once."""

    def read(name: str) -> float:
        with server.http() as http:
            found = re.findall(rf"^{name}{{\S* (\S+)$", http.get("/metrics").text, re.MULTILINE)
        return sum(map(float, found))

    for count in (65, 128, 129, 200):
        ids = token_ids(LONG)[300 : 300 + count]
        ids[0] = count  # another prompt each time
        asked, found = read("vllm:prefix_cache_queries_total"), read("vllm:prefix_cache_hits_total")
        answer = server.client.completions.create(model=ON_ANSWER, prompt=ids, max_tokens=2, temperature=0)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == count
        assert read("vllm:prefix_cache_queries_total") - asked == 2 * count
        assert read("vllm:prefix_cache_hits_total") - found == count - 1


def test_the_weights_come_before_the_first_event_of_any_stream(server: Server, gate: str) -> None:
    text = "What is a glacier?"
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 3}),
        ("/v1/completions", {"prompt": text, "max_tokens": 3}),
        ("/v1/responses", {"input": text, "max_output_tokens": 3}),
        ("/v1/messages", {"messages": [{"role": "user", "content": text}], "max_tokens": 3}),
    ]
    with server.http() as http:
        for path, body in bodies:
            plain = http.post(path, json={"model": RECIPE, **body})
            stream = http.post(path, json={"model": RECIPE, "stream": True, **body})
            assert stream.headers["x-fusion-weights"] == plain.headers["x-fusion-weights"], path
        several = http.post(
            "/v1/completions", json={"model": RECIPE, "prompt": [text, "Bees"], "max_tokens": 3, "ignore_eos": True}
        )
        assert len(json.loads(several.headers["x-fusion-weights"])) == 2
        assert several.json()["usage"]["completion_tokens"] == 6


def test_the_weights_of_several_prompts_are_in_their_order(server: Server, gate: str) -> None:
    known, new = "What is a glacier?", "Tell me how a lighthouse keeper spends a day in winter."
    with server.http() as http:

        def weigh(prompt: Any, **body: Any) -> Any:
            body = {"model": RECIPE, "prompt": prompt, "max_tokens": 2, **body}
            return json.loads(http.post("/v1/completions", json=body).headers["x-fusion-weights"])

        before = weigh(known)
        several = weigh([new, known, "Bees make honey.", known])
        assert several[1] == several[3] == before
        assert several[0] == weigh(new) != before
        assert weigh([known, new], stream=True) == [before, several[0]]
        assert weigh([new + " Why?", known], stream=True)[1] == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tilt", "'tilt' is a gate, not an adapter: name it in 'gate(…, by=tilt)'"),
        ("0.5*wide + 1*tilt", "'tilt' (at position 13) is a gate"),
        ("gate(1*wide, by=narrow, wide in 0..1)", "'narrow' (at position 16) is an adapter, not a gate"),
        ("gate(1*wide, by=tilt, wide in 1..0)", "the wrong way round"),
        ("gate(1*wide, by=tilt, narrow in 0..1)", "narrow"),
        ("gate(1*wide, by=tilt)", "expected bounds"),
    ],
)
def test_a_gate_in_the_wrong_place_is_refused(model: str, message: str, server: Server, gate: str) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1})
        assert answer.status_code == 400, answer.text
        assert message in answer.json()["error"]["message"]
        assert "tilt" not in [model["id"] for model in http.get("/v1/models").json()["data"]]


def test_a_profile_keeps_its_gate(server: Server, gate: str) -> None:
    with server.http() as http:
        rank = sum(load(server.adapters[name]).rank for name in ("narrow", "wide"))
        made = http.put("/v1/fusions/tilted", json={"fusion": RECIPE})
        assert made.status_code == 201, made.text
        assert "tilt" in made.json()["parents"]
        answer = http.post("/v1/completions", json={"model": "tilted", "prompt": "x", "max_tokens": 1})
        assert answer.headers["x-fusion-gate"] == "chose"
        assert int(answer.headers["x-fusion-rank"]) == http.get("/v1/models/tilted").json()["fusion"]["rank"] == rank
        assert http.delete("/v1/adapters/tilt").status_code == 409
        plan = http.post("/v1/fusions/plan", json={"fusion": "tilted"}).json()
        assert plan["mode"] == "mixed"
        assert http.delete("/v1/fusions/tilted").status_code == 204


def test_those_who_want_the_likeliest_tokens_get_them_beside_a_gate(server: Server, gate: str) -> None:
    """Its pass wants the numbers of two tokens, in the same steps."""
    body: dict[str, Any] = {"model": BASE_NAME, "max_tokens": 24, "temperature": 0, "logprobs": 4}
    prompts = [f"{number} chairs and a table of oak" for number in range(4)]

    def list_likeliest(prompt: str) -> list[dict[str, float]]:
        answer = server.client.completions.create(prompt=prompt, **body)
        assert answer.choices[0].logprobs is not None
        return list(answer.choices[0].logprobs.top_logprobs or ())

    alone = [list_likeliest(prompt) for prompt in prompts]
    with ThreadPoolExecutor(12) as pool:
        readings = [pool.submit(ask, server, RECIPE, [*range(300, 308), number]) for number in range(300, 348)]
        for likeliest, expected in zip(pool.map(list_likeliest, prompts), alone, strict=True):
            assert likeliest == [pytest.approx(step, abs=TOLERANCE) for step in expected]
        for reading in readings:
            reading.result()
