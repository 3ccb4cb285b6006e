"""The event loop of a running server, watched from outside."""

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.conftest import Server


@contextmanager
def watch_loop(server: Server) -> Iterator[list[float]]:
    """Ask `/livez` again and again on a connection of its own; the list gets the time of each answer in seconds."""
    times: list[float] = []
    done = threading.Event()
    host = server.url.removeprefix("http://")

    def ask() -> None:
        connection = http.client.HTTPConnection(host, timeout=120)
        while not done.is_set():
            start = time.monotonic()
            connection.request("GET", "/livez")
            assert connection.getresponse().read() is not None
            times.append(time.monotonic() - start)
            time.sleep(0.01)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield times
    finally:
        done.set()
        thread.join()
