"""Served log-probabilities equal transformers + PEFT with the adapters active side by side, float32."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from adapters import fuse, load, parse, save
from tests.conftest import BASE_NAME, Server, base_model
from tests.service.reference import PeftReference, token_ids

TOLERANCE = 1e-4
NEW_TOKENS = 6
TOPICS = "rivers bread chess violins comets bees lighthouses glaciers copper ferries maps".split()  # noqa: SIM905 - words read better so
PROMPTS = [f"Tell me, in a few plain words, what is special about {topic} and why." for topic in TOPICS]
LONG = " ".join(f"Item {i} is about {TOPICS[i % len(TOPICS)]} and weighs {i * 7 % 90} kg." for i in range(60))
MIXES = [
    "0.6*narrow + 0.4*wide",
    "0.3*narrow + 0.5*stable + 0.7*wide",
    "-0.5*narrow + 1.2*stable",
    "0*stable + 1*wide",
    "1*narrow + -1*stable + 0.25*wide",
    "pattern",
    "0.9*pattern + 0.35*wide",
    "wide",
]


@pytest.fixture(scope="module")
def reference(server: Server) -> PeftReference:
    return PeftReference(base_model(), server.adapters)


def ask(server: Server, model: str, ids: list[int]) -> tuple[list[int], list[float]]:
    """All token ids, prompt and greedy answer, and the log-probability of each after the first."""
    answer = server.client.completions.create(
        model=model,
        prompt=ids,
        max_tokens=NEW_TOKENS,
        temperature=0,
        logprobs=1,
        echo=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    new = choice.model_extra["token_ids"] if choice.model_extra else []
    values = [v for v in choice.logprobs.token_logprobs if v is not None]
    return ids + list(new)[-NEW_TOKENS:], values


def largest_difference(server: Server, reference: PeftReference, work: list[tuple[str | None, list[int]]]) -> float:
    """Ask everything at once, so that it shares batches; compare each token with the reference."""
    with ThreadPoolExecutor(len(work)) as pool:
        answers = list(pool.map(lambda w: ask(server, w[0] or BASE_NAME, w[1]), work))
    worst = 0.0
    for (recipe, _), (ids, values) in zip(work, answers, strict=True):
        expected = reference.log_probabilities(ids, recipe)
        assert len(expected) == len(values)
        worst = max(worst, *(abs(a - b) for a, b in zip(expected, values, strict=True)))
    return worst


def test_mixes_and_base_in_one_batch_are_exact(server: Server, reference: PeftReference) -> None:
    work: list[tuple[str | None, list[int]]] = []
    for i, prompt in enumerate(PROMPTS):
        ids = token_ids(prompt)
        work += [(MIXES[i % len(MIXES)], ids), (MIXES[(i + 3) % len(MIXES)], ids)]
        if i % 3 == 0:
            work.append((None, ids))
    assert largest_difference(server, reference, work) < TOLERANCE


def test_the_comparison_can_tell_mixes_apart(server: Server, reference: PeftReference) -> None:
    ids = token_ids(PROMPTS[0])
    own, values = ask(server, MIXES[0], ids)
    other = reference.log_probabilities(own, MIXES[1])
    assert max(abs(a - b) for a, b in zip(other, values, strict=True)) > 100 * TOLERANCE


def test_chunked_prefill_is_exact(server: Server, reference: PeftReference) -> None:
    ids = token_ids(LONG)
    assert len(ids) > 600  # over one step's 512 tokens
    work: list[tuple[str | None, list[int]]] = [(MIXES[0], ids), (MIXES[2], ids[:700]), (None, ids)]
    assert largest_difference(server, reference, work) < TOLERANCE


def test_a_seed_gives_one_answer_in_however_many_steps_its_prompt_is_computed(
    server: Server, reference: PeftReference
) -> None:
    ids = token_ids(LONG)[5:]  # over one step's 512 tokens, and not in the cache yet

    def ask(model: str) -> list[str]:
        answer = server.client.completions.create(
            model=model, prompt=ids, max_tokens=8, temperature=1.5, seed=3, n=2, extra_body={"ignore_eos": True}
        )
        return [choice.text for choice in answer.choices]

    for model in (MIXES[1], BASE_NAME):
        assert ask(model) == ask(model)  # the second time from the cache, in one step


def test_a_reused_prefix_stays_with_its_weights(server: Server, reference: PeftReference) -> None:
    ids = token_ids(LONG)[:300]

    @cache
    def decode(model: str | None) -> tuple[list[int], list[float]]:
        answer = server.client.completions.create(
            model=model or BASE_NAME,
            prompt=ids,
            max_tokens=NEW_TOKENS,
            temperature=0,
            logprobs=1,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        return list((answer.choices[0].model_extra or {})["token_ids"]), list(logprobs.token_logprobs)

    for model in (MIXES[0], MIXES[1], None, MIXES[0], MIXES[2]):
        decode.cache_clear()
        new, values = decode(model)
        expected = reference.log_probabilities(ids + new, model)[-NEW_TOKENS:]
        assert max(abs(a - b) for a, b in zip(expected, values, strict=True)) < TOLERANCE


def test_a_built_recipe_is_exact(server: Server, reference: PeftReference) -> None:
    # Rank 40 is over the engine's 32, so this sum cannot be mixed; svd of a rank-10 sum at 10 loses nothing.
    ids = token_ids(PROMPTS[1])
    own, values = ask(server, "svd(0.6*narrow + 0.4*wide, rank=10)", ids)
    expected = reference.log_probabilities(own, "0.6*narrow + 0.4*wide")
    assert max(abs(a - b) for a, b in zip(expected, values, strict=True)) < TOLERANCE


@pytest.fixture(scope="module")
def thin(server: Server) -> Iterator[dict[str, Path]]:
    """Adapters of two layers, for methods on the dense updates, which take long."""
    paths = {}
    for seed, (name, modules) in enumerate({"thin": ["k_proj", "down_proj"], "slim": ["q_proj", "k_proj"]}.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, layers_to_transform=[2, 17])
        model = get_peft_model(base_model(), config)
        for parameter, value in model.named_parameters():
            if "lora_B" in parameter:
                torch.nn.init.normal_(value, std=0.1)
        model.peft_config["default"].base_model_name_or_path = BASE_NAME
        paths[name] = server.adapters["wide"].parent / name
        model.save_pretrained(paths[name])
        body = {"name": name, "path": str(paths[name])}
        assert httpx.post(f"{server.url}/v1/adapters", json=body, timeout=300).status_code == 201
    yield server.adapters | paths
    for name in paths:
        assert httpx.delete(f"{server.url}/v1/adapters/{name}", timeout=300).status_code == 204


@pytest.mark.parametrize(
    "recipe",
    [
        "ties(0.6*thin + 0.4*slim, density=0.5)",
        "dare_ties(0.6*thin + 0.4*slim, density=0.5, seed=7)",
        "slerp(1*stable + 1*wide, from=wide, t=0.3)",
        "safe_merge(1*narrow + 0.7*stable, safety=wide, threshold=0.5)",
        "0.6*narrow + ramp(0.2..0.6)*wide",
        "0.6*narrow + {*.layers.1?.*: 0.8, *.self_attn.*: -0.3, *: ramp(0..1)}*wide",
    ],
)
def test_what_other_methods_build_is_served_as_peft_reads_it(
    recipe: str, server: Server, thin: dict[str, Path], tmp_path: Path
) -> None:
    adapters = {name: load(thin[name]) for name in parse(recipe).adapters}
    made, _ = fuse(parse(recipe), adapters, max_rank=32)
    save(made, tmp_path / "fused")
    model = PeftModel.from_pretrained(base_model(), tmp_path / "fused")
    ids = token_ids(PROMPTS[2])
    own, values = ask(server, recipe, ids)
    with torch.inference_mode():
        logits = model(torch.tensor([own])).logits[0].log_softmax(-1)
        with model.disable_adapter():
            plain = model(torch.tensor([own])).logits[0].log_softmax(-1)
    expected = [float(logits[i, token]) for i, token in enumerate(own[1:])]
    assert max(abs(a - b) for a, b in zip(expected, values, strict=True)) < TOLERANCE
    assert max(abs(float(plain[i, token]) - values[i]) for i, token in enumerate(own[1:])) > 100 * TOLERANCE
