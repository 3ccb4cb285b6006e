"""An OpenAI-compatible endpoint that answers by rule and can be told to fail: for faults, and for judges."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = str
"""`hang`, `cut`, `garbage`, `filter` (an answer withheld), or an HTTP status."""


@dataclass
class Faulty:
    """`say(body)` is the answer to a chat; `fault(body)` the failure of that request, or "" for none; `complete(body)`
    the choice that answers a text completion, `refuse(body)` why it is a bad request, or ""; `headers(body)` are those
    of the answer to a chat.
    """

    say: Callable[[dict[str, Any]], str]
    fault: Callable[[dict[str, Any]], Fault] = lambda body: ""
    complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    refuse: Callable[[dict[str, Any]], str] = lambda body: ""
    headers: Callable[[dict[str, Any]], dict[str, str]] = lambda body: {}
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)


def last_prompt(body: dict[str, Any]) -> str:
    """The last message of a chat."""
    return str(body["messages"][-1]["content"])


class Server(ThreadingHTTPServer):
    """Answers by `rules`."""

    request_queue_size = 128  # connections that wait: the default of 5 resets some of many at once

    def __init__(self, rules: Faulty) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rules = rules


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def send(self, status: int, content: Any, length: int | None = None, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        if self.path.endswith("/models"):
            self.send(200, {"data": [{"id": "base", "object": "model"}]})
        else:
            self.send(404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.endswith("/chat/completions"):
            self.chat(body)
        else:
            self.complete(body)

    def complete(self, body: dict[str, Any]) -> None:
        rules = self.server.rules
        if rules.complete is None:
            self.send(404, {})
        elif reason := rules.refuse(body):
            self.send(400, {"error": {"message": reason}})
        else:
            self.send(200, {"choices": [rules.complete(body)]})

    def chat(self, body: dict[str, Any]) -> None:
        rules = self.server.rules
        rules.bodies.append(body)
        fault = rules.fault(body)
        message = {"role": "assistant", "content": "" if fault else rules.say(body)}
        reason = "content_filter" if fault == "filter" else "stop"
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        }
        match fault:
            case "" | "filter":
                self.send(200, answer, headers=rules.headers(body))
            case "hang":
                time.sleep(8)
            case "cut":
                content = json.dumps(answer).encode()
                self.send(200, content[:20], length=len(content))
                self.close_connection = True
            case "garbage":
                self.send(200, b"<html>not what you asked for</html>")
            case status:
                self.send(int(status), {"error": {"message": "no", "type": "x", "code": status}})


@contextmanager
def endpoint(rules: Faulty) -> Iterator[Faulty]:
    """Serve `rules` on a free port."""
    server = Server(rules)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    rules.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield rules
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
