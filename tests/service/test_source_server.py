"""A real server that fetches, is killed in the middle, and goes on when it is started again."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.files import WEIGHTS
from tests.conftest import ROOT, family, stop
from tests.service.own import Own, wait
from tests.service.source_servers import Handler, files, serve, share, start_body, tag
from tests.service.test_faults import folder  # noqa: F401 - a fixture

pytestmark = pytest.mark.soak
HALF = 2_000_000


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Holds back the second half of the weights."""
    event = threading.Event()
    yield event
    event.set()


def test_a_killed_server_goes_on_with_its_fetch(folder: Callable[[], Path], gate: threading.Event) -> None:  # noqa: F811 - a fixture
    contents = files(ROOT / "examples/adapters/task")

    def answer(handler: Handler) -> None:
        if handler.path.endswith(WEIGHTS) and not gate.is_set():
            start_body(handler, content_length=str(len(contents[WEIGHTS])), etag=tag(contents[WEIGHTS]))
            handler.wfile.write(contents[WEIGHTS][:HALF])
            handler.wfile.flush()
            gate.wait(300)
        else:
            share({f"/task/{name}": content for name, content in contents.items()})(handler)

    with serve(answer) as host:
        settings: dict[str, Any] = {"FUSION_SOURCES": host.url, "FUSION_SOURCE_NETWORKS": "127.0.0.0/8"}
        first = Own(folder(), **settings, FUSION_SOURCE_TIMEOUT_S="300")
        try:
            first.wait_ready()
            http = httpx.Client(base_url=first.url, timeout=60)
            began = http.post("/v1/adapters", json={"name": "task", "source": f"{host.url}/task"})
            assert began.status_code == 202, began.text
            wait(lambda: http.get("/v1/adapters/task").json().get("bytes", 0) >= HALF, 30)
            for pid in family(first.process.pid):
                os.kill(pid, signal.SIGKILL)
            first.process.wait(30)
        finally:
            stop(first.process)
        gate.set()
        again = Own(folder(), data=first.data, **settings)
        try:
            again.wait_ready()
            http = httpx.Client(base_url=again.url, timeout=60)
            wait(lambda: "digest" in http.get("/v1/adapters/task").json(), 60)
            ranges = [sent.get("range") for _, path, sent in host.asked if path.endswith(WEIGHTS)]
            begins = [int(text.removeprefix("bytes=").rstrip("-")) for text in ranges if text]
            assert begins
            assert begins[0] > HALF - 2**19, "all but what was not yet written"
            body = {"model": "task", "prompt": "The oak stool", "max_tokens": 4}
            answered = http.post("/v1/completions", json=body, timeout=300)
            assert answered.status_code == 200, answered.text
        finally:
            stop(again.process)
