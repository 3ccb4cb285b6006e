"""Prometheus' text form, of thousands of series in milliseconds: routers read it many times a second.

The library writes names, labels and numbers anew whenever a series is read, most of its time; here they are kept.
"""

from collections.abc import Iterator
from functools import lru_cache

from prometheus_client import REGISTRY, CollectorRegistry, disable_created_metrics, generate_latest, metrics
from prometheus_client.core import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from service.histograms import Written

write_number = lru_cache(2**14)(floatToGoString)
"""A number as Prometheus has it: most are counts that many series have, or the bounds of buckets."""


class _One:
    """A collector of one metric."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        """The metric."""
        yield self._metric


def _write(metric: Metric) -> str:
    return generate_latest(_One(metric)).decode()  # type: ignore[arg-type]  # reads as a registry


@lru_cache(2**10)
def _write_about(name: str, documentation: str, kind: str) -> str:
    return _write(Metric(name, documentation, kind))


class TextWriter:
    """Writes a registry as the library's `generate_latest` does, byte for byte."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        # A sixth of all rows, which only OpenMetrics has a use for.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's
        if not hasattr(metrics, "floatToGoString"):
            raise ImportError("prometheus_client.metrics has no floatToGoString: install the pins in requirements/")
        metrics.floatToGoString = write_number  # type: ignore[attr-defined]  # histograms label each bucket by it
        self._registry = registry
        self._heads: dict[tuple[str, ...], str] = {}
        """Names and labels of the series that were read last."""

    def write(self) -> bytes:
        """The text; may run in several threads at once."""
        heads: dict[tuple[str, ...], str] = {}
        parts: list[str] = []
        for metric in self._registry.collect():
            parts.append(_write_about(metric.name, metric.documentation, metric.type))  # HELP and TYPE
            if isinstance(metric, Written):
                parts.append(metric.write_rows())
                continue
            for sample in metric.samples:
                key = (sample.name, *sample.labels.values())
                head = heads[key] = self._heads.get(key) or _write_head(sample)
                parts.append(f"{head} {write_number(sample.value)}\n")
        self._heads = heads
        return "".join(parts).encode()


def _write_head(sample: Sample) -> str:
    metric = Metric(sample.name, "", "gauge")
    metric.samples.append(Sample(sample.name, sample.labels, 0))
    return _write(metric).rpartition(" ")[0].rpartition("\n")[2]
