"""The text of metrics is the library's own, byte for byte."""

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, Summary, generate_latest

from service.exposition import TextWriter

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
