"""Recipes whose weights are functions, over HTTP on the real engine, against PEFT with weights by position."""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.conftest import BASE_NAME, Server, base_model
from tests.service.reference import PeftReference, token_ids
from tests.service.test_exact import LONG, PROMPTS, TOLERANCE

NEW_TOKENS = 10
Weigh = Callable[[int, int], Mapping[str, float]]
"""The adapters' weights at a token of the answer (below 0: in the prompt) in a layer."""


def line(first: float, last: float, count: int, token: int) -> float:
    """On the straight line from the answer's first token to its token number `count`, level outside of it."""
    return first + (last - first) * min(max(token, 0), count - 1) / (count - 1)


FORMS: dict[str, Weigh] = {
    "0.9*wide + steps(prompt: 0.4, 0: 1.0, 4: -0.2)*narrow": lambda token, _: {
        "wide": 0.9,
        "narrow": 0.4 if token < 0 else 1.0 if token < 4 else -0.2,
    },
    "0.9*wide + fade(1.0..0.2, 8)*narrow": lambda token, _: {"wide": 0.9, "narrow": line(1.0, 0.2, 8, token)},
    "answer(0.6*wide + 0.4*stable)": lambda token, _: {"wide": 0.6 * (token >= 0), "stable": 0.4 * (token >= 0)},
    "answer(1*wide + fade(1..0, 4)*narrow)": lambda token, _: {
        "wide": float(token >= 0),
        "narrow": line(1, 0, 4, token) * (token >= 0),
    },
    "ramp(-0.5..1)*wide": lambda _, layer: {"wide": -0.5 + 1.5 * layer / 29},
    "{*.layers.2?.*: steps(0: 1), *: steps(prompt: 0.5, 3: ramp(0..1))}*narrow": lambda token, layer: {
        "narrow": float(token >= 0) if layer >= 20 else 0.5 if token < 3 else layer / 29
    },
    "0.3*narrow + 0.5*wide": lambda *_: {"narrow": 0.3, "wide": 0.5},
    BASE_NAME: lambda *_: {},
}


class PositionReference(PeftReference):
    """PEFT whose scalings are vectors over the positions."""

    @torch.inference_mode()
    def by_position(self, ids: Sequence[int], prompt: int, weigh: Weigh) -> list[float]:
        """Log-probability of every token after the first; the first `prompt` of them are the prompt."""
        names = {id(module): name for name, module in self.model.named_modules()}
        for layer, unit in zip(self.layers, self.unit, strict=True):
            number = int(names[id(layer)].partition("layers.")[2].partition(".")[0])
            # The position before a token computes it.
            rows = [weigh(position - (prompt - 1), number) for position in range(len(ids))]
            for name, scaling in unit.items():
                values = torch.tensor([[[scaling * row.get(name, 0.0)] for row in rows]])
                layer.scaling[name] = values  # type: ignore[assignment]  # broadcasts where PEFT multiplies
        self.model.base_model.set_adapter(self.names)
        logits = self.model(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)
        return [float(logits[i, token]) for i, token in enumerate(ids[1:])]


@pytest.fixture(scope="module")
def reference(server: Server) -> PositionReference:
    return PositionReference(base_model(), {name: server.adapters[name] for name in ("narrow", "stable", "wide")})


def ask(server: Server, model: str, ids: Sequence[int], count: int = NEW_TOKENS, **options: Any) -> list[Any]:
    """(tokens, log-probabilities) of each answer; with `echo` those of the prompt come first."""
    raw = server.client.completions.with_raw_response.create(
        model=model,
        prompt=list(ids),
        max_tokens=count,
        temperature=options.pop("temperature", 0),
        logprobs=1,
        extra_body={"return_token_ids": True, "ignore_eos": True},
        **options,
    )
    assert raw.headers.get("x-fusion-mode", "mixed") == "mixed"
    answers = []
    for choice in raw.parse().choices:
        assert choice.logprobs is not None
        tokens = list((choice.model_extra or {})["token_ids"])[-count:]
        answers.append((tokens, [v for v in choice.logprobs.token_logprobs or () if v is not None]))
    return answers


def find_error(reference: PositionReference, ids: Sequence[int], model: str, answers: list[Any]) -> float:
    worst = 0.0
    for tokens, values in answers:
        expected = reference.by_position([*ids, *tokens], len(ids), FORMS[model])[-len(values) :]
        worst = max(worst, *(abs(a - b) for a, b in zip(expected, values, strict=True)))
    return worst


def test_all_forms_in_one_batch_are_exact(server: Server, reference: PositionReference) -> None:
    """Prompt and answer, one and several answers, short prompts and ones of more than a step's 512 tokens."""
    forms = list(FORMS)
    short = [(forms[i % len(forms)], token_ids(prompt), {"echo": True}) for i, prompt in enumerate(PROMPTS)]
    several = [(form, token_ids(PROMPTS[3]), {"n": 2, "temperature": 1}) for form in forms[1:3]]
    long: list[Any] = [(form, token_ids(LONG)[: 600 + 7 * i], {}) for i, form in enumerate(forms)]
    work: list[Any] = [*short, *several, *long]
    with ThreadPoolExecutor(len(work)) as pool:
        answers = list(pool.map(lambda one: ask(server, one[0], one[1], **one[2]), work))
    for (model, ids, _), answer in zip(work, answers, strict=True):
        assert find_error(reference, ids, model, answer) < TOLERANCE, model


@pytest.mark.parametrize("model", list(FORMS)[:4])
def test_the_next_turn_is_exact(model: str, server: Server, reference: PositionReference) -> None:
    """The answer comes back as a part of the prompt; its blocks were computed with other weights."""
    first = token_ids(LONG)[50:200]
    ((tokens, _),) = ask(server, model, first, 40)
    second = [*first, *tokens, *token_ids(PROMPTS[0])]
    answers = ask(server, model, second) + ask(server, model, second)
    assert find_error(reference, second, model, answers) < TOLERANCE


def test_the_comparison_can_tell_forms_apart(server: Server, reference: PositionReference) -> None:
    ids = token_ids(PROMPTS[0])
    own = {model: [*ids, *ask(server, model, ids)[0][0]] for model in FORMS}
    values = {model: reference.by_position(own["ramp(-0.5..1)*wide"], len(ids), FORMS[model]) for model in FORMS}
    for model, one in values.items():
        for other in (values[name] for name in values if name != model):
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 100 * TOLERANCE


def test_an_answer_only_mix_never_seen_shares_a_prompt_of_the_base(server: Server) -> None:
    ids = token_ids(LONG)[100:500]

    def read_hits() -> float:
        with server.http() as http:
            text = http.get("/metrics").text
        return sum(float(value) for value in re.findall(r"^vllm:prefix_cache_hits_total\S* (\S+)$", text, re.MULTILINE))

    def count_cached(model: str) -> float:
        before = read_hits()
        server.client.completions.create(model=model, prompt=ids, max_tokens=2)
        return read_hits() - before

    assert count_cached(BASE_NAME) == 0
    assert count_cached("answer(0.123*wide)") >= len(ids) - 32
    assert count_cached("answer(0.3*wide + fade(1..0, 3)*narrow)") >= len(ids) - 32
    assert count_cached("0.123*wide") == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("1*wide + steps(4: 1, 0: 0.2)*narrow", "token 0 comes after token 4"),
        ("1*wide + steps(0: 1, prompt: 0.2)*narrow", "'prompt' comes after token 0"),
        ("answer(steps(prompt: 1)*narrow)", "has a weight for the prompt inside answer(…)"),
        (f"answer(1*{BASE_NAME})", "(at position 9) is the base model, which has no weight"),
        ("answer(ties(1*narrow + 1*wide))", "expected one of"),
        ("{*.mlp.*: 1}*wide", "add '*' as the last one"),
        ("fade(1..0, 1)*wide", "a fade goes over 2 to"),
        ("gate(1*wide, by=narrow, wide in 0.8..0)", "the wrong way round"),
        ("gate(1*wide, by=narrow, wide in 0..0.8)", "does not contain 1, the weight when the gate fails"),
    ],
)
def test_what_cannot_be_is_refused(model: str, message: str, server: Server) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1})
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
