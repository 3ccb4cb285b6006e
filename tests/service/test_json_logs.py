"""JSON logs: every line is an object, requests have one each, and nothing that a client wrote or keeps secret."""

import io
import json
import logging
import time
from typing import Any

import pytest

from service.edge.request_log import RequestLog
from service.json_logs import JsonFormatter
from tests.conftest import BASE_NAME, Server
from tests.service.edge_app import answer_ok

SECRET = "sk-Zx81-never-in-a-log"
LIMIT_S = 30
PROMPT = "quartz lantern beneath the willow"


def test_a_record_is_one_line_whatever_it_has() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    log = logging.getLogger("json")
    log.addHandler(handler)
    key = "lf-0f3a5c7e9b1d-" + "Abc_" * 10 + "-xy"
    try:
        raise ValueError(f"two\nlines {key}")
    except ValueError:
        log.exception("a\r\n%s \ud800 “q”", "b", extra={"fusion_fields": {"status": 500}})
    finally:
        log.removeHandler(handler)
    (line,) = stream.getvalue().splitlines()
    content = json.loads(line)
    assert (content["level"], content["status"]) == ("ERROR", 500)
    assert "Abc_Abc_" not in line
    assert "two" in content["traceback"]


@pytest.mark.anyio
async def test_a_key_in_a_path_is_in_no_line(caplog: pytest.LogCaptureFixture) -> None:
    secret = "Abc_" * 10 + "-xy"
    for before in ("", "x" * 170):  # also where the line ends within the key
        scope = {"type": "http", "method": "GET", "path": f"/v1/models/{before}lf-0f3a5c7e9b1d-{secret}", "headers": []}
        with caplog.at_level(logging.INFO, "fusion.access"):
            await RequestLog(answer_ok)(scope, None, send_nothing)  # type: ignore[arg-type]  # nothing is received
        line = JsonFormatter().format(caplog.records[-1])
        assert "/v1/models/" in line
        assert secret[:8] not in line


async def send_nothing(message: Any) -> None:
    pass


def read_lines(server: Server, start: int = 0) -> list[dict[str, Any]]:
    with server.log.open("rb") as log:
        log.seek(start)
        return [json.loads(line) for line in log.read().decode().splitlines() if line.endswith("}")]


def wait_line(server: Server, start: int, id_: str) -> dict[str, Any]:
    """A request's line, which comes after its answer's last byte."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := [line for line in read_lines(server, start) if line.get("request_id") == id_]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (line,) = found
    return line


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_one_line_that_says_who_asked_for_what_and_what_came(small_server: Server, stream: bool) -> None:
    start = small_server.log.stat().st_size
    with small_server.http() as http:
        body = {"model": "0.5*task", "prompt": PROMPT, "max_tokens": 3, "min_tokens": 3, "stream": stream}
        trace = f"00-{'ab' * 16}-{'cd' * 8}-01"
        answer = http.post("/v1/completions", json=body, headers={"x-request-id": "mine-1", "traceparent": trace})
        assert answer.status_code == 200
    line = wait_line(small_server, start, "mine-1")
    assert (line["profile"], line["status"], line["mode"]) == ("(inline)", 200, "mixed")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (answer_tokens(answer, stream), 3)
    assert line["trace_id"] == "ab" * 16
    assert 0 < line["duration_s"] < 60
    assert (line["key"], line["tenant"], line["role"], line["path"]) == ("", "", "admin", "/v1/completions")


def answer_tokens(answer: Any, stream: bool) -> Any:
    return pytest.approx(6, abs=6) if stream else answer.json()["usage"]["prompt_tokens"]


def test_a_request_without_an_id_gets_one_that_its_answer_has(small_server: Server) -> None:
    start = small_server.log.stat().st_size
    with small_server.http() as http:
        id_ = http.get("/v1/models").headers["x-request-id"]
    assert wait_line(small_server, start, id_)["path"] == "/v1/models"


def test_no_line_of_a_run_has_prompts_answers_or_secrets(small_server: Server) -> None:
    begin = small_server.log.stat().st_size
    headers = {"authorization": f"Bearer {SECRET}", "x-api-key": SECRET, "cookie": f"session={SECRET}"}
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"model": "task", **chat}),
        ("/v1/chat/completions", {"model": BASE_NAME, **chat, "stream": True}),
        ("/v1/completions", {"model": "0.5*task", "prompt": [PROMPT, PROMPT], "max_tokens": 2}),
        ("/v1/completions", {"model": "0.5*task", "prompt": PROMPT * 2000, "max_tokens": 2}),  # too long
        ("/v1/completions", {"model": "task", "prompt": {"text": PROMPT}}),  # of a wrong type
        ("/v1/completions", {"model": "task", "prompt": PROMPT, "max_tokens": PROMPT}),
        ("/v1/chat/completions", {"model": "task", "messages": PROMPT}),
        ("/v1/responses", {"model": "task", "input": PROMPT, "max_output_tokens": 2}),
        ("/v1/messages", {"model": "task", **chat}),
        ("/tokenize", {"model": BASE_NAME, "prompt": PROMPT}),
        ("/v1/chat/completions", {"model": "task", **chat, "chat_template": PROMPT}),
        ("/v1/completions", {"model": "task", "prompt": PROMPT, "structured_outputs": {"regex": f"({PROMPT}"}}),
    ]
    with small_server.http() as http:
        for path, body in bodies:
            http.post(path, json=body, headers=headers)
            http.post(f"{path}?key={SECRET}", content=json.dumps(body)[:-1], headers=headers)  # not JSON
        http.put("/v1/fusions/logged", json={"fusion": "task", "defaults": {"system": PROMPT}}, headers=headers)
        http.post("/v1/chat/completions", json={"model": "logged", **chat}, headers=headers)
        http.delete("/v1/fusions/logged", headers=headers)
    text = small_server.log.read_text()
    assert SECRET not in text
    assert "willow" not in text
    written = text.encode()[begin:].decode().splitlines()
    lines = [json.loads(line) for line in written]  # each is JSON, of whichever process
    assert len([line for line in lines if line["logger"] == "fusion.access"]) > len(bodies)
