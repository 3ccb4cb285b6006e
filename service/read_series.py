"""Prometheus gauges whose values are looked up when they are read, and what mixes there are to be looked up."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Rows = Iterable[tuple[Sequence[str], float]]
"""Labels and value of each series."""
WINDOW_S = 60.0
MAX_SEEN = 16_384
"""Vectors of weights that are remembered for a minute at most."""
SHORT_KEY = 12
"""Digits of a stack's key that tell resident ones apart."""


class ReadGauge(Collector):
    """A gauge with the rows of its `source`, which may be called in any thread."""

    def __init__(self, name: str, documentation: str, *labels: str, registry: CollectorRegistry) -> None:
        self._about = name, documentation
        self._labels = labels
        self.source: Callable[[], Rows] = tuple
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """The name alone."""
        yield GaugeMetricFamily(*self._about, labels=self._labels)

    def collect(self) -> Iterator[Metric]:
        """The series now."""
        family = GaugeMetricFamily(*self._about, labels=self._labels)
        for labels, value in self.source():
            family.add_metric(labels, value)
        yield family


class Mixes:
    """Which vectors of weights run on which stack, and which have run within a minute."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._running: dict[str, Counter[str]] = {}
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._now = now

    def begin(self, stack: str, vector: str) -> None:
        """A request with this vector of weights begins on a stack."""
        self._running.setdefault(stack, Counter())[vector] += 1
        self.see(vector)

    def end(self, stack: str, vector: str) -> None:
        """It has ended."""
        vectors = self._running[stack]
        vectors[vector] -= 1
        if not vectors[vector]:
            del vectors[vector]
        if not vectors:
            del self._running[stack]

    def see(self, vector: str) -> None:
        """A vector of weights acts, as a gate has chosen it."""
        now = self._now()
        self._seen[vector] = now
        self._seen.move_to_end(vector)
        while len(self._seen) > MAX_SEEN or next(iter(self._seen.values())) <= now - WINDOW_S:
            self._seen.popitem(last=False)

    def list_running(self) -> Rows:
        """How many different vectors run on each stack."""
        return [((stack[:SHORT_KEY],), float(len(vectors))) for stack, vectors in list(self._running.items())]

    def count_seen(self) -> Rows:
        """How many different vectors have run within a minute."""
        since = self._now() - WINDOW_S
        return [((), float(sum(seen > since for seen in list(self._seen.values()))))]
