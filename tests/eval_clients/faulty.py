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
    the choice that answers a text completion, `refuse(body)` why it is a bad request, or "".
    """

    say: Callable[[dict[str, Any]], str]
    fault: Callable[[dict[str, Any]], Fault] = lambda body: ""
    complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    refuse: Callable[[dict[str, Any]], str] = lambda body: ""
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)


def prompt_of(body: dict[str, Any]) -> str:
    """The last message of a chat."""
    return str(body["messages"][-1]["content"])


@contextmanager
def endpoint(rules: Faulty) -> Iterator[Faulty]:
    """Serves `rules` on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def send(self, status: int, content: bytes, announced: int | None = None) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content) if announced is None else announced))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            if not self.path.endswith("/models"):
                self.send(404, b"{}")
                return
            self.send(200, json.dumps({"data": [{"id": "base", "object": "model"}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if not self.path.endswith("/chat/completions"):
                if rules.complete is None:
                    self.send(404, b"{}")
                elif reason := rules.refuse(body):
                    self.send(400, json.dumps({"error": {"message": reason}}).encode())
                else:
                    self.send(200, json.dumps({"choices": [rules.complete(body)]}).encode())
                return
            rules.bodies.append(body)
            fault = rules.fault(body)
            message = {"role": "assistant", "content": "" if fault else rules.say(body)}
            choice = {
                "index": 0,
                "message": message,
                "finish_reason": "content_filter" if fault == "filter" else "stop",
            }
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            answer = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "usage": usage}
            content = json.dumps({**answer, "choices": [choice]}).encode()
            if fault == "hang":
                time.sleep(3)
                return
            if fault == "cut":
                self.send(200, content[:20], announced=len(content))
                self.close_connection = True
            elif fault == "garbage":
                self.send(200, b"<html>not what you asked for</html>")
            elif fault not in ("", "filter"):
                self.send(int(fault), json.dumps({"error": {"message": "no", "type": "x", "code": fault}}).encode())
            else:
                self.send(200, content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    rules.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield rules
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
