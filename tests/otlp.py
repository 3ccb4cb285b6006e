"""An OTLP collector for tests: takes what any exporter sends over HTTP or gRPC, and keeps the spans."""

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

LIMIT_S = 30


@dataclass
class OtlpCollector:
    """Spans by trace id, in hexadecimal digits."""

    url: str = ""
    grpc_url: str = ""
    spans: dict[str, list[Any]] = field(default_factory=dict)
    services: set[str] = field(default_factory=set)

    def take(self, request: Any) -> None:
        for resource in request.resource_spans:
            self.services.update(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.setdefault(span.trace_id.hex(), []).append(span)

    def wait_for(self, trace: str, is_whole: Callable[[list[Any]], bool]) -> list[Any]:
        """The spans of a trace once they are whole."""
        deadline = time.monotonic() + LIMIT_S
        while not is_whole(self.spans.get(trace, [])):
            found = [span.name for span in self.spans.get(trace, [])]
            assert time.monotonic() < deadline, f"the trace {trace} has only {found}"
            time.sleep(0.1)
        return self.spans[trace]


@contextmanager
def run_collector() -> Iterator[OtlpCollector]:
    """A collector on free ports of loopback."""
    collector = OtlpCollector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                content = gzip.decompress(content)
            assert self.path == "/v1/traces"
            collector.take(trace_service_pb2.ExportTraceServiceRequest.FromString(content))
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Service(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]  # it has no types
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
            collector.take(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    remote = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), remote)  # type: ignore[no-untyped-call]  # made by a generator
    collector.grpc_url = f"http://127.0.0.1:{remote.add_insecure_port('127.0.0.1:0')}"
    collector.url = f"http://127.0.0.1:{web.server_address[1]}"
    threading.Thread(target=web.serve_forever, daemon=True).start()
    remote.start()
    try:
        yield collector
    finally:
        web.shutdown()
        remote.stop(0)
