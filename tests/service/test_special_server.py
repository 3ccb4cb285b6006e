"""LoRA on the embedding and the output head (A7, E4 of the inputs): served built, equal to transformers + PEFT."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.conftest import BASE_NAME, ENGINE, Server, base_model, launch, stop, wait_ready
from tests.service.reference import PeftReference
from tests.service.special_adapters import SPECIAL, make_special

TOLERANCE, NEW_TOKENS = 1e-4, 5
PROMPTS = [[504, 2834, 282, 4649, 314, n, 30, 1812 + n, 665] for n in range(400, 408)]
RECIPES = [
    "head",
    "ends",
    "words",
    "0.6*head + 0.4*ends",
    "0.7*ends + -0.5*words + 0.3*dense",
    "svd(0.6*head + 0.4*ends, rank=7)",
]
SAME_AS = {"svd(0.6*head + 0.4*ends, rank=7)": "0.6*head + 0.4*ends"}
"""A rank that loses nothing."""


def ask(url: str, model: str, ids: list[int]) -> tuple[httpx.Response, list[int], list[float]]:
    """The answer, all token ids, and the log-probability of each after the first, those of the prompt included."""
    body = {"model": model, "prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1, "echo": True}
    answer = httpx.post(
        f"{url}/v1/completions", json=body | {"return_token_ids": True, "ignore_eos": True}, timeout=300
    )
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    values = [value for value in choice["logprobs"]["token_logprobs"] if value is not None]
    return answer, ids + choice["token_ids"][-NEW_TOKENS:], values


def largest_difference(url: str, reference: PeftReference, base_name: str, recipes: list[str | None]) -> float:
    """All at once, so that they share batches."""
    work = [(recipe, prompt) for recipe in recipes for prompt in PROMPTS[:3]]
    with ThreadPoolExecutor(len(work)) as pool:
        answers = list(pool.map(lambda item: ask(url, item[0] or base_name, item[1]), work))
    worst = 0.0
    for (recipe, _), (_, ids, values) in zip(work, answers, strict=True):
        expected = reference.log_probabilities(ids, SAME_AS.get(recipe or "", recipe))
        assert len(expected) == len(values)
        worst = max(worst, *(abs(a - b) for a, b in zip(expected, values, strict=True)))
    return worst


def register(url: str, folders: dict[str, Path]) -> dict[str, dict[str, object]]:
    cards = {}
    for name, folder in folders.items():
        answer = httpx.post(f"{url}/v1/adapters", json={"name": name, "path": str(folder)}, timeout=300)
        assert answer.status_code == 201, answer.text
        cards[name] = answer.json()
    return cards


@pytest.fixture(scope="module")
def special(server: Server) -> Iterator[PeftReference]:
    """The default base has one matrix for both ends (tied): an adapter on one end leaves the other as it is."""
    base, folder = base_model(), next(iter(server.adapters.values())).parent
    folders = {name: make_special(base, name, folder, BASE_NAME) for name in SPECIAL}
    cards = register(server.url, folders)
    assert {name: card.get("built", "") for name, card in cards.items()} == {
        "head": "lm_head",
        "ends": "lm_head, model.embed_tokens",
        "words": "model.embed_tokens",
        "dense": "",
    }
    yield PeftReference(base, folders)
    for name in folders:
        httpx.delete(f"{server.url}/v1/adapters/{name}", timeout=60)


def test_special_layers_equal_peft_beside_mixes_and_the_base(server: Server, special: PeftReference) -> None:
    assert largest_difference(server.url, special, BASE_NAME, [RECIPES[3], "0.5*dense", None]) < TOLERANCE
    assert largest_difference(server.url, special, BASE_NAME, [RECIPES[4], None]) < TOLERANCE


def test_a_recipe_with_a_special_layer_is_built_and_says_why(server: Server, special: PeftReference) -> None:
    answer, ids, values = ask(server.url, "0.6*head + 0.4*dense", PROMPTS[0])
    assert answer.headers["x-fusion-mode"] == "built"
    assert answer.headers["x-fusion-error"] == "0"
    plain = special.log_probabilities(ids, "0.4*dense")
    assert max(abs(a - b) for a, b in zip(plain, values, strict=True)) > 100 * TOLERANCE
    plan = httpx.post(f"{server.url}/v1/fusions/plan", json={"fusion": "0.6*head + 0.4*dense"}, timeout=60).json()
    assert (plan["mode"], plan["reason"]) == ("built", "LoRA on lm_head cannot be mixed")


@pytest.mark.soak
@pytest.mark.parametrize("tied", [False, True])
def test_special_layers_of_a_small_base_equal_peft(tied: bool, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from tests.conftest import BASE

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "base")
    folders = {name: make_special(base, name, tmp_path / "adapters", "small") for name in SPECIAL}
    process, url = launch(
        tmp_path / "data", tmp_path / "adapters", tmp_path / "log",
        FUSION_BASE=str(tmp_path / "base"), FUSION_BASE_NAME="small", FUSION_ENGINE_ARGS=ENGINE,
    )  # fmt: skip
    try:
        wait_ready(process, url, tmp_path / "log")
        register(url, folders)
        reference = PeftReference(base, folders)
        for recipe in RECIPES:
            assert largest_difference(url, reference, "small", [recipe, "0.5*dense", None]) < TOLERANCE, recipe
    finally:
        stop(process)
