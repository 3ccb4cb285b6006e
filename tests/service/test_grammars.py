"""What answers must match is compiled by a child that its limits end, and not again on the event loop."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output.request import StructuredOutputKey, get_structured_output_key

from service.engine.grammars import GrammarChecker, checked, skip_checked

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
TAG = {"begin": "<a>", "schema": {"type": "array", "minItems": 10**9}, "end": "</a>"}
GOOD: list[dict[str, Any]] = [
    {"json": {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}},
    {"json": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 50}},
    {"json": {"$defs": {"t": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/t"}]}}, "$ref": "#/$defs/t"}},
    {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}}},
    {"json_object": True},
    {"regex": "[0-9]{4}-[0-9]{2}"},
    {"grammar": 'root ::= "a" | "b" root'},
    {"choice": ["yes", "no"]},
    {"structural_tag": json.dumps({"structures": [TAG | {"schema": {"type": "null"}}], "triggers": ["<a>"]})},
]
BOMBS: dict[str, dict[str, Any]] = {
    "memory": {"json": {"type": "array", "minItems": 10**9}},
    "memory in a grammar": {"grammar": 'start: %json {"type": "array", "minItems": 1000000000}'},
    "stack": {"json": {"type": "object", "required": [str(i) for i in range(25_000)]}},
    "stack of references": {
        "json": {
            "$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(5000)} | {"a5000": {"type": "null"}},
            "$ref": "#/$defs/a0",
        }
    },
    "time": {"json": {"allOf": [{"type": "string", "pattern": f"a{{{i}}}"} for i in range(100)]}},
    "time of patterns": {"json": {"patternProperties": {f"^a{{{i}}}$": True for i in range(3000)}}},
    "time of keys": {"json": {"type": "object", "properties": {f"{i}": True for i in range(15_000)}}},
    "no grammar": {"grammar": "start: missing"},
    "no JSON": {"json": "[" * 100_000},
}


@pytest.fixture
async def grammars() -> AsyncIterator[GrammarChecker]:
    made = GrammarChecker(SimpleNamespace(disable_any_whitespace=True, disable_additional_properties=False))
    await made.start()
    yield made
    await made.close()


def key(wanted: dict[str, Any]) -> StructuredOutputKey:
    return get_structured_output_key(StructuredOutputsParams(**wanted))


async def test_what_answers_can_match_is_good(grammars: GrammarChecker) -> None:
    for wanted in GOOD:
        await grammars.check(key(wanted))
        assert checked.get() == key(wanted)


@pytest.mark.parametrize("name", BOMBS)
async def test_no_form_of_an_answer_takes_more_than_its_limits(grammars: GrammarChecker, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(VLLMClientError):
        await grammars.check(key(BOMBS[name]))
    assert time.monotonic() - start < 20
    assert checked.get() is None
    await grammars.check(key(GOOD[0]))


async def test_the_prompts_of_a_request_wait_for_one_child(grammars: GrammarChecker) -> None:
    asked: list[Any] = []
    ask = grammars.ask

    async def count(request: Any) -> Any:
        asked.append(request)
        return await ask(request)

    grammars.ask = count  # type: ignore[method-assign]  # to be counted
    await asyncio.gather(*(grammars.check(key(GOOD[3])) for _ in range(200)))
    results = await asyncio.gather(*(grammars.check(key(BOMBS["time"])) for _ in range(200)), return_exceptions=True)
    assert all(isinstance(result, VLLMClientError) for result in results)
    assert len(asked) == 2


async def test_vllm_compiles_only_what_no_child_has(grammars: GrammarChecker) -> None:
    compiled: list[Any] = []
    validate = skip_checked(compiled.append)
    one, other = (SamplingParams(structured_outputs=StructuredOutputsParams(**wanted)) for wanted in GOOD[:2])
    await grammars.check(key(GOOD[0]))
    for params in (one, SamplingParams(), other):
        validate(params)
    assert len(compiled) == 2
    assert compiled[1] is other
