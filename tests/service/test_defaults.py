"""A profile's defaults: how each route spells them, and what a request says itself."""

from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel, Field, ValidationError

from service.defaults import with_defaults
from service.routes.schemas import ProfileBody
from service.validation import describe_fault, describe_union_fault

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
PATHS = st.sampled_from((CHAT, COMPLETIONS, RESPONSES, MESSAGES, f"{CHAT}/batch", "/tokenize"))
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
        (RESPONSES, {"system": "Be brief."}, {"input": "Hi."}, {"input": [SYSTEM, USER]}),
        (RESPONSES, {"system": "Be brief."}, {"input": [USER]}, {"input": [SYSTEM, USER]}),
        (RESPONSES, {"system": "Be brief."}, {"input": "Hi.", "instructions": "Be long."}, {}),
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


class Choice(BaseModel):
    """One of two kinds of bodies."""

    kind: Literal["a", "b"]
    value: dict[str, int] = {}


@pytest.mark.parametrize(
    "body", [{"kind": "x" * 9999}, {"kind": "a", "value": {"k" * 9999: "x"}}, {"kind": "a", "value": {"k": "x" * 9999}}]
)
def test_an_error_repeats_little_of_a_body(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Choice.model_validate(body)
    errors = caught.value.errors()
    for message, param in (
        describe_fault(errors),
        describe_union_fault([{**e, "loc": (0, *e["loc"])} for e in errors]),
    ):
        assert len(message) < 400
        assert len(param or "") < 200
    message, param = refuse(**{"k" * 9999: 1})
    assert len(message) < 400
    assert len(param or "") < 200


def test_a_list_that_is_too_long_is_not_said_to_be_no_text() -> None:
    class Body(BaseModel):
        stop: str | Annotated[list[str], Field(max_length=2)] | None = None

    def describe(stop: Any) -> tuple[str, str | None]:
        with pytest.raises(ValidationError) as caught:
            Body.model_validate({"stop": stop})
        return describe_union_fault([{**e, "loc": ("body", *e["loc"])} for e in caught.value.errors()])

    message, param = describe(["a", "b", "c"])
    assert (param, "at most 2 items" in message) == ("stop", True)
    message, param = describe(["a", 7])
    assert (param, message) == ("stop.1", "'stop.1': Input should be a valid string, got 7.")
    message, param = describe(7)
    assert (param, message) == ("stop", "'stop': Input should be a valid string, got 7.")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "messages", "input"]), inner),
)
EVERYTHING = {"system": "Be brief.", "temperature": 0.5, "top_p": 0.9, "max_tokens": 3, "stop": "x"}


@given(body=st.dictionaries(st.sampled_from(["messages", "input", "stop", "system", "max_tokens"]), JSON), path=PATHS)
def test_defaults_take_any_json(body: dict[str, Any], path: str) -> None:
    merged = with_defaults(body, EVERYTHING, path)
    assert merged.keys() >= body.keys()


def test_each_conversation_of_a_batch_gets_the_system_turn() -> None:  # D2
    body = {"messages": [[USER], [SYSTEM, USER], "x"]}
    merged = with_defaults(body, {"system": "Be brief."}, "/v1/chat/completions/batch")
    assert merged["messages"] == [[SYSTEM, USER], [SYSTEM, USER], "x"]
