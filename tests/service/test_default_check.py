"""A profile's defaults before an app in vLLM's place, also that of a base without a chat template."""

import json
from typing import Any

import pytest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from service.default_check import check_defaults
from service.engine.models import served_model
from service.errors import ApiError

pytestmark = pytest.mark.anyio
GOOD, BAD = "{{ messages }}", "{{ unknown_function() }}"


async def base_without_template(scope: Scope, receive: Receive, send: Send) -> None:
    """Chats need a profile's template, which must not call what there is not; answers have 2048 tokens at most."""
    body = json.loads((await receive())["body"])
    current = served_model.get()
    assert current is not None
    error = ""
    if "messages" in body or scope["path"] == "/v1/responses":
        if current.chat_template is None:
            error = "no chat template"
        elif "unknown_function" in current.chat_template:
            error = "unknown_function is undefined"
    if max(body.get("max_tokens", 0), body.get("max_output_tokens", 0)) > 2048:
        error = error or "over 2048"
    await JSONResponse({"error": {"message": error}}, 400 if error else 200)(scope, receive, send)


@pytest.mark.parametrize(
    ("defaults", "param", "words"),
    [
        ({}, "", ""),
        ({"chat_template": GOOD, "max_tokens": 9}, "", ""),
        ({"system": "x", "max_tokens": 9}, "", ""),  # chats are refused without them, too
        ({"chat_template": BAD}, "defaults.chat_template", "unknown_function"),  # D1
        ({"temperature": 1.0, "chat_template": BAD}, "defaults.chat_template", "unknown_function"),
        ({"chat_template": GOOD, "max_tokens": 10**9}, "defaults.max_tokens", "over 2048"),  # D1
        ({"max_tokens": 10**9}, "defaults.max_tokens", "/v1/completions"),
    ],
)
async def test_the_default_at_fault_is_named_also_without_a_template_of_the_base(
    defaults: dict[str, Any], param: str, words: str
) -> None:
    if not param:
        await check_defaults(base_without_template, defaults)
        return
    with pytest.raises(ApiError) as caught:
        await check_defaults(base_without_template, defaults)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message
