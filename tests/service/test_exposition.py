"""The text of metrics is the library's own, byte for byte."""

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, Summary, generate_latest

from service.exposition import TextWriter
from service.histograms import LabeledHistogram

ODD = ("", 'quo"ted', "back\\slash", "line\nfeed", "a b", "ü\x0b\u2028", "{x}", "e=1,f 2")


def test_every_kind_of_metric_and_label_is_written_as_by_the_library() -> None:
    registry = CollectorRegistry()
    writer = TextWriter(registry)
    counter = Counter("c", "with\nlines \\ of text", ["one", "two"], registry=registry)
    gauge = Gauge("vllm:g", "", ["one"], registry=registry)
    histogram = Histogram("h", "", ["one"], registry=registry, buckets=(0.5, 1e9))
    Info("i", "", registry=registry).info({"version": 'v"1'})
    Enum("e", "", registry=registry, states=["on", "off"]).state("off")
    summary = Summary("s_seconds", "", ["one"], registry=registry, unit="seconds")
    for turn in range(3):
        for label in ODD:
            counter.labels(label, "x").inc(1e17)
            gauge.labels(label).set(float("nan") if turn else float("-inf"))
            histogram.labels(label).observe(turn)
            summary.labels(label).observe(0.25)
        assert writer.write() == generate_latest(registry)
    counter.remove(ODD[0], "x")
    gauge.clear()
    assert writer.write() == writer.write() == generate_latest(registry)


def test_a_labeled_histogram_is_the_library_s_own_whenever_it_is_read() -> None:
    library, ours = CollectorRegistry(), CollectorRegistry()
    expected = Histogram("h", "text", ["one"], registry=library, buckets=(0.001, 0.5, 1, 1e9))
    histogram = LabeledHistogram("h", "text", "one", (0.001, 0.5, 1, 1e9), registry=ours)
    writer = TextWriter(ours)
    for value in (0.5, 0.1, 2, 1e10, 0, 0.5):
        for label in ODD:
            expected.labels(label).observe(value)
            histogram.observe(label, value)
        assert writer.write() == writer.write() == generate_latest(ours) == generate_latest(library)
    histogram.observe("a b", 0.25, 3)
    for _ in range(3):
        expected.labels("a b").observe(0.25)
    expected.remove(ODD[0])
    histogram.remove(ODD[0])
    histogram.remove("never")
    assert writer.write() == generate_latest(library)
    assert ours.get_sample_value("h_count", {"one": "a b"}) == 9
