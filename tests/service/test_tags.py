"""Structural tags: their shape is checked where a body is read, and nothing is compiled there."""

import json
import time
from typing import Any

import pytest
import xgrammar
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError

from service.engine import patches, tags

TAG = {"begin": "<a>", "schema": {"type": "string"}, "end": "</a>"}
LEGACY: dict[str, Any] = {"structures": [TAG], "triggers": ["<a>"]}
NEW: dict[str, Any] = {"format": {"type": "const_string", "value": "a"}}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    patches.install()

    def compile_tag(*_: object) -> None:
        raise AssertionError("a grammar is compiled on the event loop")

    monkeypatch.setattr(xgrammar.Grammar, "from_structural_tag", compile_tag)


@pytest.mark.parametrize("tag", [LEGACY, NEW])
def test_a_tag_of_either_form_is_taken_without_compiling_it(tag: dict[str, Any]) -> None:
    wanted = {"structural_tag": json.dumps(tag)}
    assert CompletionRequest.model_validate({"model": "m", "prompt": "x", "structured_outputs": wanted})
    form = {"type": "structural_tag", **tag}
    turns = [{"role": "user", "content": "x"}]
    assert ChatCompletionRequest.model_validate({"model": "m", "messages": turns, "response_format": form})


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "{",
        "[]",
        "null",
        None,
        json.dumps({"structures": [TAG]}),
        json.dumps({**LEGACY, "structures": [{"begin": "<a>"}]}),
        json.dumps({**LEGACY, "structures": 1}),
        json.dumps({"format": "x"}),
        json.dumps({**LEGACY, "structures": [TAG] * 1000}),
        "[" * 10_000,
    ],
)
def test_what_is_no_tag_is_the_client_s_fault(payload: Any) -> None:
    start = time.process_time()
    with pytest.raises(VLLMValidationError):
        tags.check_tag(payload, parameter="structured_outputs")
    assert time.process_time() - start < 0.2
