"""What a JSON body may hold: refused before anything else reads it, in a time that does not grow with what it holds."""

import json
import time
from typing import Any

import pytest

from service import body
from service.errors import ApiError

MEGABYTE = 1_000_000


def refuse(raw: bytes | Any) -> str:
    """The sentence with which a body is refused."""
    with pytest.raises(ApiError) as caught:
        body.parse_body(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    assert caught.value.status == 400
    return caught.value.message


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [{"role": "user", "content": '{"a": [1, {"b": "}]"}]}' * 9000}]},
        {"tokens": list(range(100_000))},
        {"logit_bias": {str(i): 1 for i in range(50_000)}},
        {"text": "\U0001f600 ü \u4e2d"},
        [1, 2, 2**63 - 1, -(2**63), 0.1234567890123456789, 12345678901234567890.5, 1e300, "9223372036854775808"],
        {"id": "\\" + "9" * 30 + '"' + "9" * 30, "9" * 30: list(range(10))},
        None,
    ],
)
@pytest.mark.parametrize("is_ascii", [True, False])
def test_what_honest_clients_send_is_read(value: Any, is_ascii: bool) -> None:
    assert body.parse_body(json.dumps(value, ensure_ascii=is_ascii).encode()) == value
    assert body.parse_body(json.dumps(value, ensure_ascii=is_ascii).encode("utf-8-sig")) == value


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"a": [' + b"{}," * 300_000 + b"{}]}", "JSON body has more than 16384 objects"),
        (b'{"a": [' + b"[[[]]]," * 5000 + b"[]]}", "5001 objects or lists"),
        (
            b'{"a": [' + b"[{}," * 2 + b"1" + b"]" * 2 + b"]" + b',"b": [' + b"[1]," * 4096 + b"[]]}",
            "4097 objects or lists",
        ),
        (b"[" * 101 + b"]" * 101, "nested more than 100 deep"),
        (b"[" * 5000 + b"]" * 5000, "not valid JSON|nested"),
        (json.dumps({str(i): 1 for i in range(70_000)}).encode(), "70000 keys"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": {"b": ["x", "\\uD83D"]}}', "not valid JSON"),
        (b'{"a": "\xed\xa0\x80"}', "not valid JSON"),
        (b'{"\\udc00": 1}', "not valid JSON"),
        (b'{"a": [9223372036854775808]}', "integer 9223372036854775808 is outside 64 bits"),
        (b'{"a": -' + b"9" * 5000 + b"}", "outside 64 bits|not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        ('{"a": "\u4e2d"}'.encode("utf-16"), "not valid JSON"),
        (('{"a": ["' + "[{" * 9000 + '"]}').encode("utf-16-le"), "not valid JSON"),
        (b'{"a": 9223372036854775808}'.decode().encode("utf-32-be"), "not valid JSON"),
        (b'{"id": "1234567890123456789", "a": [' + b"1," * 480_000 + b"9223372036854775808]}", "outside 64 bits"),
        (b'{"a": [' + b"1234567890123456789," * 48_000 + b"12345678901234567890]}", "outside 64 bits"),
        (b"{" * 17_000 + b'\\"' * 480_000, "16384 objects"),
        (b"{" * 17_000 + b'"' + b'\\"' * 480_000, "16384 objects"),
        (b"{" * 17_000 + b'\\"' * 480_000 + b"\\\n", "16384 objects"),
    ],
)
def test_what_holds_too_much_is_refused_soon(raw: bytes, words: str) -> None:
    times = []
    for _ in range(3):  # a collection of this process's garbage may fall into one
        start = time.process_time()
        with pytest.raises(ApiError, match=words):
            body.parse_body(raw)
        times.append(time.process_time() - start)
    assert min(times) < 0.2 * max(1, len(raw) / MEGABYTE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"stop": "a" * 70_000},
        {"stop": ["a" * 1000] * 70},
        {"stop_sequences": ["a" * 1000] * 70},
        {"prompt": ["a"] * 1025},
        {"prompt": [[1]] * 600, "n": 2},
        {"messages": [[{}]] * 600, "n": 2},
        {"prompt": ["a"] * 1024, "n": "2"},
        {"prompt": ["a"] * 1024, "n": " 2 "},
        {"prompt": ["a"] * 1024, "n": 2.0},
        {"prompt": "a", "n": 1025},
        {"bad_words": ["a" * 1000] * 17},
        {"prompt": "a", "repetition_penalty": 1e-40},
        {"prompt": "a", "repetition_penalty": "1e-5"},
        {"prompt": "a", "length_penalty": -400},
        {"prompt": "a", "length_penalty": "1e9"},
        {"prompt": "a", "length_penalty": "nan"},
        {"prompt": ["a"] * 100, "logit_bias": {str(i): 1 for i in range(9000)}},
        {"prompt": "a", "n": 128, "allowed_token_ids": [1] * 20_000},
        {"messages": [[{}]] * 1024, "response_format": {"a": "a" * 5000}},
        {"prompt": ["a"] * 1024, "vllm_xargs": {"a": "\u4e2d" * 1000}},
    ],
)
def test_a_request_asks_for_a_bounded_number_of_answers(wrong: dict[str, Any]) -> None:
    with pytest.raises(ApiError):
        body.check_counts(wrong)


@pytest.mark.parametrize(
    "right",
    [
        {"prompt": list(range(5000)), "n": 8},
        {"messages": [{}] * 2000},
        {"stop": ["a", 1]},
        {"prompt": "a", "length_penalty": -2.5},
        {"prompt": "a", "repetition_penalty": 0.5},
        {"prompt": "a", "repetition_penalty": 0},  # which vLLM refuses
        {"n": "x", "prompt": [None]},
        {"n": "nan", "prompt": "a"},
        {"n": "inf", "prompt": "a"},
        {"n": None, "prompt": "a" * 1_000_000, "logit_bias": {str(i): 1 for i in range(60_000)}},
        {"prompt": ["a" * 1000] * 1024, "stop": ["x"]},
        {"messages": [{"content": "a" * 1_000_000}], "n": 128},
    ],
)
def test_one_long_prompt_is_one(right: dict[str, Any]) -> None:
    body.check_counts(right)


def test_only_variables_of_a_template_are_its_arguments() -> None:
    with pytest.raises(ApiError, match="'messages' is not one"):
        body.check_arguments({"chat_template_kwargs": {"messages": []}}, frozenset({"messages"}))
    body.check_arguments({"chat_template_kwargs": {"enable_thinking": False}}, frozenset({"messages"}))
    body.check_arguments({"chat_template_kwargs": 3}, frozenset({"messages"}))


@pytest.mark.parametrize("key", ["kv_transfer_params", "ec_transfer_params"])
def test_what_vllm_adds_to_its_arguments_is_not_given_there(key: str) -> None:
    with pytest.raises(ApiError, match=f"may not hold '{key}'"):
        body.check_arguments({"vllm_xargs": {"x": 1, key: "text"}}, frozenset())
    body.check_arguments({"vllm_xargs": {"x": 1}, key: {"y": 1}}, frozenset())
