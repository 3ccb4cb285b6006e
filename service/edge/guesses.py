"""Wrong API keys: how many one client may try in a minute."""

import math
import time
from collections import OrderedDict

MAX_GUESSES = 10
WINDOW_S = 60.0
MAX_CLIENTS = 10_000
"""Clients that are remembered; the one that began first is forgotten for another."""


class Guesses:
    """Wrong keys by client, since the first of each in its minute."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def count(self, client: str) -> None:
        """Remember one more wrong key."""
        since, number = self._find(client)
        if not number:
            self._clients.pop(client, None)
            if len(self._clients) >= MAX_CLIENTS:
                self._clients.popitem(last=False)
        self._clients[client] = (since, number + 1)

    def wait_s(self, client: str) -> int:
        """Seconds for which no more keys of the client are looked at; 0: the next one is."""
        since, number = self._find(client)
        return math.ceil(since + WINDOW_S - time.monotonic()) if number >= MAX_GUESSES else 0

    def _find(self, client: str) -> tuple[float, int]:
        now = time.monotonic()
        since, number = self._clients.get(client, (now, 0))
        return (since, number) if now < since + WINDOW_S else (now, 0)
