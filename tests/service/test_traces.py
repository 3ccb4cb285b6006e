"""One request, one trace: from the client's span over the service's own to vLLM's, at a real collector."""

import secrets
from collections.abc import Mapping
from typing import Any

import pytest
from opentelemetry import trace

from service.errors import ApiError
from service.tracing import Collector, Traces, TraceSettingError, find_collector, traced, traces
from tests.conftest import Server
from tests.otlp import OtlpCollector, run_collector

ENDPOINT = "http://127.0.0.1:4318"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT}, Collector(f"{ENDPOINT}/v1/traces", "http/protobuf")),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": f"{ENDPOINT}/"}, Collector(f"{ENDPOINT}/v1/traces", "http/protobuf")),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{ENDPOINT}/x"}, Collector(f"{ENDPOINT}/x", "http/protobuf")),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            Collector(ENDPOINT, "grpc"),
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT, "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, None),
    ],
)
def test_the_standard_variables_say_where_traces_go(given: Mapping[str, str], expected: Collector | None) -> None:
    assert find_collector(given) == expected


@pytest.mark.parametrize(("name", "value"), [("PROTOCOL", "http/json"), ("TRACES_PROTOCOL", "x")])
def test_a_protocol_that_vllm_does_not_speak_is_named(name: str, value: str) -> None:
    with pytest.raises(TraceSettingError, match=rf"{value}.*expected http/protobuf or grpc"):
        find_collector({"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT, f"OTEL_EXPORTER_OTLP_{name}": value})


def test_nothing_is_traced_without_a_collector() -> None:
    @traced("never")
    def look() -> bool:
        return trace.get_current_span().get_span_context().is_valid

    assert traces.provider is None
    assert not look()


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Traces:
    """Traces that leave those of the process alone."""
    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(trace, "set_tracer_provider", lambda _: None)  # of the whole process
    monkeypatch.setattr("service.tracing.set_global_response_propagator", lambda _: None)
    return Traces()


def test_spans_arrive_over_grpc_too(own: Traces) -> None:
    with run_collector() as collector:
        own.start(Collector(collector.grpc_url, "grpc"))
        with own.span("outer") as outer, own.span("inner"):
            own.describe(mode="mixed")
        assert own.provider is not None
        own.provider.shutdown()
        (inner, found) = collector.wait_for(f"{outer.get_span_context().trace_id:032x}", lambda spans: len(spans) == 2)
    assert (inner.name, found.name, inner.parent_span_id) == ("inner", "outer", found.span_id)
    assert [(a.key, a.value.string_value) for a in inner.attributes] == [("fusion.mode", "mixed")]


def test_the_span_of_an_error_has_nothing_of_what_a_client_sent(own: Traces) -> None:
    with run_collector() as collector:
        own.start(Collector(f"{collector.url}/v1/traces", "http/protobuf"))
        with pytest.raises(ApiError), own.span("resolve") as span:
            raise ApiError(404, "No model is called 'lf-0123456789ab-a-secret'.")
        assert own.provider is not None
        own.provider.shutdown()
        (found,) = collector.wait_for(f"{span.get_span_context().trace_id:032x}", bool)
    assert [(a.key, a.value.string_value) for a in found.attributes] == [("error.type", "404")]
    assert found.status.code == found.status.STATUS_CODE_ERROR
    assert not found.events
    assert b"lf-0123456789ab" not in found.SerializeToString()


def check_tree(spans: list[Any], root: str) -> dict[str, str]:
    """That spans are one tree below the span `root`; the name of each one's parent, by name."""
    by_id = {span.span_id.hex(): span for span in spans}
    for span in spans:
        seen, at = set(), span
        while (parent := at.parent_span_id.hex()) != root:
            assert parent in by_id, f"{span.name!r} hangs on {parent}, which is not in the trace"
            assert parent not in seen
            seen.add(parent)
            at = by_id[parent]
    return {s.name: by_id[p].name if (p := s.parent_span_id.hex()) in by_id else "client" for s in spans}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_tree_from_the_client_to_vllm(
    small_server: Server, collector: OtlpCollector, stream: bool
) -> None:
    client = secrets.token_hex(8)
    with small_server.http() as http:
        for attempt in range(20):  # on a busy machine a build takes longer than requests of this server may wait
            trace_id = secrets.token_hex(16)
            model = f"svd(0.5*task + 0.{4 + stream}{attempt:02}37*safety, rank=4)"  # which is built, and new
            answer = http.post(
                "/v1/completions",
                json={"model": model, "prompt": "A quiet marble", "max_tokens": 3, "stream": stream},
                headers={"traceparent": f"00-{trace_id}-{client}-01"},
            )
            if answer.status_code != 503:
                break
        assert answer.status_code == 200, answer.text
        assert answer.headers["traceresponse"].split("-")[1] == trace_id
    ours = {"resolve", "policy", "lease", "engine"}
    named = ours | {"fuse", "load", "llm_request"}
    spans = collector.wait_for(trace_id, lambda spans: {span.name for span in spans} > named)
    parents = check_tree(spans, client)
    server = parents["resolve"]
    assert parents[server] == "client"
    below = {"fuse": "lease", "load": "lease", "llm_request": "engine"}
    assert {name: parents[name] for name in named} == dict.fromkeys(ours, server) | below
    assert "marble" not in str(spans)
    assert "lora-fusion" in collector.services


def test_health_checks_leave_no_trace(small_server: Server, collector: OtlpCollector) -> None:
    trace_id, other = secrets.token_hex(16), secrets.token_hex(16)
    with small_server.http() as http:
        for path, id_ in (("/health", trace_id), ("/metrics", trace_id), ("/v1/models", other)):
            http.get(path, headers={"traceparent": f"00-{id_}-{'ab' * 8}-01"})
    collector.wait_for(other, bool)
    assert trace_id not in collector.spans
