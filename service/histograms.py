"""Histograms of many labels that are read often: what has not changed since the last reading is not written again."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

write_number: Callable[[float], str] = floatToGoString
"""A number as Prometheus has it."""


class _Series:
    """The counts of one label's values."""

    __slots__ = ("changes", "counts", "label", "text", "total")

    def __init__(self, label: str, buckets: int) -> None:
        self.label = label
        self.counts = [0] * buckets
        self.total = 0.0
        self.changes = 0
        self.text = -1, ""
        """After how many changes it was written last, and how."""


class Written(Metric):
    """A metric whose rows are text already; its samples are made for whoever asks for them."""

    def __init__(self, histogram: "LabeledHistogram", name: str, documentation: str) -> None:
        super().__init__(name, documentation, "histogram")
        self._histogram = histogram
        del self.samples

    def __getattr__(self, name: str) -> object:
        if name == "samples":
            return list(self._histogram.list_samples())
        raise AttributeError(name)

    def write_rows(self) -> str:
        """All rows, without HELP and TYPE."""
        return self._histogram.write_rows()


class LabeledHistogram(Collector):
    """A Prometheus histogram with one label; `buckets` are their upper bounds, +Inf aside."""

    def __init__(
        self, name: str, documentation: str, label: str, buckets: Sequence[float], *, registry: CollectorRegistry
    ) -> None:
        self._about = name, documentation
        self._label = label
        self._bounds = [float(bound) for bound in buckets]
        self._names = [*map(write_number, self._bounds), "+Inf"]
        self._series: dict[str, _Series] = {}
        registry.register(self)

    def observe(self, label: str, value: float, count: int = 1) -> None:
        """Count `value` so many times."""
        series = self._series.get(label)
        if series is None:
            series = self._series[label] = _Series(label, len(self._names))
        series.counts[bisect_left(self._bounds, value)] += count
        series.total += value * count
        series.changes += 1

    def remove(self, label: str) -> None:
        """Drop the series of a label, if there is one."""
        self._series.pop(label, None)

    def describe(self) -> Iterator[Metric]:
        """The name alone."""
        yield Metric(*self._about, "histogram")

    def collect(self) -> Iterator[Metric]:
        """All series now."""
        yield Written(self, *self._about)

    def list_samples(self) -> Iterator[Sample]:
        """What the library's own histogram would have."""
        name = self._about[0]
        for series in list(self._series.values()):
            labels, count = {self._label: series.label}, 0
            for bound, count in zip(self._names, accumulate(list(series.counts)), strict=True):
                yield Sample(f"{name}_bucket", {**labels, "le": bound}, float(count))
            yield Sample(f"{name}_count", labels, float(count))
            yield Sample(f"{name}_sum", labels, series.total)

    def write_rows(self) -> str:
        """The same as text; may run beside `observe`, whose value is then in this reading or in the next."""
        return "".join(self._write(series) for series in list(self._series.values()))

    def _write(self, series: _Series) -> str:
        changes, text = series.changes, series.text
        if text[0] == changes:
            return text[1]
        name, sums = self._about[0], [*map(write_number, accumulate(list(series.counts)))]
        value = series.label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
        label = f'{self._label}="{value}"'
        rows = [
            f'{name}_bucket{{le="{bound}",{label}}} {count}\n' for bound, count in zip(self._names, sums, strict=True)
        ]
        rows += [f"{name}_count{{{label}}} {sums[-1]}\n", f"{name}_sum{{{label}}} {write_number(series.total)}\n"]
        series.text = changes, "".join(rows)
        return series.text[1]
