"""A profile's defaults: how each route spells them, and what a request says itself."""

from typing import Any

import pytest
from pydantic import ValidationError

from service.defaults import with_defaults
from service.routes.schemas import ProfileBody
from service.validation import describe_fault

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


def refuse(**defaults: Any) -> tuple[str, str | None]:
    """The sentence and the parameter with which a profile of these defaults is refused."""
    with pytest.raises(ValidationError) as caught:
        ProfileBody.model_validate({"fusion": "task", "defaults": defaults})
    return describe_fault(caught.value.errors())


def test_a_wrong_default_names_its_key_and_value() -> None:
    message, param = refuse(temperature=-1)
    assert message == "'defaults.temperature' should be greater than or equal to 0, got -1."
    assert param == "defaults.temperature"


def test_a_template_that_cannot_be_parsed_is_refused_with_its_line() -> None:
    assert "not a valid Jinja template, line 2" in refuse(chat_template="ok\n{% for")[0]
