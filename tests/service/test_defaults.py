"""A profile's defaults: how each route spells them, and what a request says itself."""

from typing import Any

import pytest

from service.defaults import check_defaults, with_defaults
from service.errors import ApiError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
USER, SYSTEM = {"role": "user", "content": "Hi."}, {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("path", "defaults", "body", "added"),
    [
        (CHAT, {"temperature": 0.5, "top_p": 0.9}, {"top_p": None}, {"temperature": 0.5, "top_p": 0.9}),
        (CHAT, {"temperature": 0.5}, {"temperature": 0}, {}),
        (CHAT, {"stop": "x"}, {}, {"stop": "x"}),
        (MESSAGES, {"stop": "x"}, {}, {"stop_sequences": ["x"]}),
        (MESSAGES, {"stop": ["x", "y"]}, {}, {"stop_sequences": ["x", "y"]}),
        (COMPLETIONS, {"max_tokens": 3}, {}, {"max_tokens": 3}),
        (RESPONSES, {"max_tokens": 3}, {}, {"max_output_tokens": 3}),
        (CHAT, {"max_tokens": 3}, {"max_completion_tokens": 9}, {}),
        (CHAT, {"system": "Be brief."}, {"messages": [USER]}, {"messages": [SYSTEM, USER]}),
        (CHAT, {"system": "Be brief."}, {"messages": [{**SYSTEM, "role": "developer"}, USER]}, {}),
        (COMPLETIONS, {"system": "Be brief."}, {"prompt": "Hi."}, {}),
        (MESSAGES, {"system": "Be brief."}, {"messages": [USER]}, {"system": "Be brief."}),
        (MESSAGES, {"system": "Be brief."}, {"messages": [USER], "system": "Be long."}, {}),
        (RESPONSES, {"system": "Be brief."}, {"input": "Hi."}, {"instructions": "Be brief."}),
        (RESPONSES, {"system": "Be brief."}, {"input": [SYSTEM, USER]}, {}),
        (CHAT, {"chat_template": "{{ x }}"}, {"messages": [USER]}, {}),
    ],
)
def test_defaults_fill_only_what_a_request_leaves_out(
    path: str, defaults: dict[str, Any], body: dict[str, Any], added: dict[str, Any]
) -> None:
    before = dict(body)
    assert with_defaults(body, defaults, path) == {**body, **added}
    assert body == before


def test_checked_defaults_have_no_nulls() -> None:
    assert check_defaults({"temperature": 0.5, "stop": None}) == {"temperature": 0.5}
    assert check_defaults(None) == {}


def test_a_wrong_default_names_its_key_and_value() -> None:
    with pytest.raises(ApiError, match=r"'defaults.temperature' should be .*equal to 0, got -1\.") as caught:
        check_defaults({"temperature": -1})
    assert (caught.value.status, caught.value.param) == (400, "defaults.temperature")


def test_a_template_that_cannot_be_parsed_is_refused_with_its_line() -> None:
    with pytest.raises(ApiError, match="not a valid Jinja template, line 2"):
        check_defaults({"chat_template": "ok\n{% for"})
