"""Requests that choose an adapter as other servers have it are refused: the base would answer in silence (r24)."""

from pathlib import Path
from typing import Any

import pytest

from service.spelling import FOREIGN_KEYS
from tests.service.intakes import BASE, Setup, make_setup

MESSAGES = [{"role": "user", "content": "Q"}]
FOREIGN: dict[str, dict[str, Any]] = {
    "LoRAX": {"adapter_id": "a", "adapter_source": "local"},
    "LoRAX's merge": {"merged_adapters": {"ids": ["a", "b"], "weights": [0.6, 0.4], "merge_strategy": "linear"}},
    "SGLang": {"lora_path": "a"},
    "SGLang's batch": {"lora_path": ["a", None]},
    "llama.cpp": {"lora": [{"id": 0, "scale": 0.5}]},
    "vLLM's offline class": {"lora_request": {"lora_name": "a", "lora_int_id": 1}},
    "diffusers": {"loras": [{"path": "a", "scale": 1}]},
    "our JSON form outside of fusion": {"adapters": [{"name": "a", "weight": 1}]},
    "a plural": {"fusions": "1*a"},
    "a key of our answers": {"recipe": "1*a"},
    "the argument of OpenAI's client": {"extra_body": {"fusion": "1*a"}},
}


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return make_setup(tmp_path)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("named", [{"model": BASE}, {"model": "a"}, {}])
def test_what_chooses_elsewhere_is_refused(setup: Setup, name: str, named: dict[str, str]) -> None:
    answer = setup.post({**named, "messages": MESSAGES, **FOREIGN[name]})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] in FOREIGN[name]
    assert "'fusion'" in error["message"]
    assert not setup.vllm.bodies


@pytest.mark.parametrize("key", sorted(FOREIGN_KEYS))
@pytest.mark.parametrize("value", [None, "", [], {}])
def test_keys_without_a_value_choose_nothing(setup: Setup, key: str, value: object) -> None:
    assert setup.post({"model": BASE, "messages": MESSAGES, key: value}).status_code == 200


def test_other_keys_that_vllm_leaves_out_are_passed_on(setup: Setup) -> None:
    body = {"model": BASE, "messages": MESSAGES, "extra_body": {"top_k": 5}, "metadata": {"adapter_id": "a"}}
    assert setup.post(body).status_code == 200
    assert setup.post({"tokens": [1], "adapter_id": "a"}, "/detokenize").status_code == 200
