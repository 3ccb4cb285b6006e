"""Requests made from the API's description: schemathesis' own, and good bodies with one key after another made bad."""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from tests.conftest import BASE_NAME

TURNS = [{"role": "user", "content": "Name three rivers."}]
CHAT = {"model": BASE_NAME, "messages": TURNS, "max_tokens": 1}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/chat/completions/batch": {**CHAT, "messages": [TURNS, TURNS]},
    "/v1/completions": {"model": BASE_NAME, "prompt": "Rivers:", "max_tokens": 1},
    "/v1/responses": {"model": BASE_NAME, "input": "Name three rivers.", "max_output_tokens": 1},
    "/v1/messages": CHAT,
    "/v1/messages/count_tokens": CHAT,
    "/tokenize": {"model": BASE_NAME, "messages": TURNS},
    "/detokenize": {"model": BASE_NAME, "tokens": [1, 2]},
    "/v1/fusions/plan": {"fusion": "1*wide"},
    "/v1/adapters": {"name": "never", "path": "/nowhere"},
    "/v1/load_lora_adapter": {"lora_name": "never", "lora_path": "/nowhere"},
    "/v1/unload_lora_adapter": {"lora_name": "never"},
}
LIMITS = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
"""Without one, a request goes on to the end of the context."""
BAD: list[Any] = [
    *(None, True, False, 0, -1, 2, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf")),
    *(
        "",
        "\ud800",
        "\x00",
        "a" * 5000,
        "../../etc",
        "none",
        "1*wide",
        [],
        [[]],
        [None],
        [{}],
        [-1],
        [10**30],
        ["\ud800"],
    ),
    *({}, {"": None}, {"a": {"b": [1]}}, {"type": "object"}, {"type": "json_object"}, {"role": {}}),
]
TURN_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "type", "audio", "refusal")
CONTENTS: list[Any] = [
    [{"type": kind, kind: {}}] for kind in ("text", "image_url", "input_audio", "file", "x", "video_url")
]


@dataclass(frozen=True)
class Ask:
    """One request and where it comes from."""

    method: str
    path: str
    content: bytes
    content_type: str = "application/json"


def keys(schema: Any, schemas: dict[str, Any]) -> set[str]:
    """Keys of the objects that an OpenAPI schema describes, through references and alternatives."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    parts = [part for name in ("allOf", "anyOf", "oneOf") for part in schema.get(name, ())]
    return set(schema.get("properties", ())).union(*(keys(part, schemas) for part in parts))


def one_key_bad(document: dict[str, Any]) -> Iterator[Ask]:
    """Each good body with each of its keys, and each key of a turn, replaced by each bad value."""
    for path, good in GOOD.items():
        content = document["paths"][path]["post"]["requestBody"]["content"]
        names = good.keys() | keys(content["application/json"]["schema"], document["components"]["schemas"])
        for key, value in itertools.product(sorted(names), BAD):
            if key not in LIMITS or isinstance(value, str | list | dict | float):
                yield Ask("POST", path, json.dumps({**good, key: value}).encode())
        if good.get("messages") == TURNS:
            for key, value in itertools.product(TURN_KEYS, BAD + CONTENTS):
                yield Ask("POST", path, json.dumps({**good, "messages": [{**TURNS[0], key: value}]}).encode())


def collect(operation: Any, mode: GenerationMode, count: int) -> list[Ask]:
    """Up to `count` requests of one operation, always the same for one version of schemathesis."""
    asks: list[Ask] = []

    @seed(0)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def add(case: Any) -> None:
        body = case.body
        if isinstance(body, dict) and body.keys() & {"model", "messages", "prompt", "input"}:
            # A model that exists, and an end: else each request would be a 404, or take its time.
            body |= {"model": BASE_NAME, "max_tokens": 1, "max_output_tokens": 1, "max_completion_tokens": 1}
        if isinstance(body, dict) and body.get("role") == "admin":
            body["role"] = "user"  # the first key is an admin's, and from then on nobody else would be answered
        content = body if isinstance(body, bytes) else json.dumps(body, default=str).encode()
        asks.append(Ask(case.method, case.formatted_path, content, case.media_type or "application/json"))

    try:
        add()
    except Unsatisfiable:
        return []  # an operation without input has no invalid requests
    return asks


def from_schemathesis(document: dict[str, Any], count: int) -> Iterator[Ask]:
    """At least `count` requests that schemathesis makes of all operations, valid and invalid ones."""
    results = schemathesis.openapi.from_dict(document).get_all_operations()
    operations = [result.ok() for result in results if isinstance(result, Ok)]
    with_body = [operation for operation in operations if operation.body]
    for operation in operations:
        each = -(-count // (2 * len(with_body))) if operation in with_body else 3
        for mode in GenerationMode:
            yield from collect(operation, mode, each)


def sample(asks: Iterator[Ask], count: int) -> list[Ask]:
    """`count` of them, always the same ones."""
    everything = list(asks)
    return random.Random(0).sample(everything, min(count, len(everything)))


def find_fault(http: httpx.Client, ask: Ask) -> str | None:
    """What is wrong with the answer to a request: a 5xx, or an error in a shape of its own; None when nothing is."""
    headers = {"content-type": ask.content_type}
    try:
        answer = http.request(ask.method, ask.path, content=ask.content, headers=headers)
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {ask}"
    if answer.status_code >= 500 and not (answer.status_code == 503 and "retry-after" in answer.headers):
        return f"{answer.status_code} {answer.text[:300]}: {ask}"
    if answer.status_code >= 400 and ask.method != "HEAD":
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return f"{answer.status_code} in another shape {answer.text[:300]}: {ask}"
        if not message or "Traceback" in message or "object at 0x" in message:
            return f"{answer.status_code} {message[:300]}: {ask}"
    return None
