"""OpenTelemetry traces of requests, sent to the collector that OpenTelemetry's own variables name; off without one.

A trace begins where the client's does (`traceparent`) and goes on inside vLLM, whose span is a child of "engine".
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

from opentelemetry import propagate, trace
from opentelemetry.instrumentation.propagators import TraceResponsePropagator, set_global_response_propagator
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from starlette.types import ASGIApp, Receive, Scope, Send

F = TypeVar("F", bound=Callable[..., Any])
PROTOCOLS = ("http/protobuf", "grpc")
PREFIX = "OTEL_EXPORTER_OTLP_"
NAME = "lora-fusion"
QUIET = "/(livez|readyz|healthz|health|ping|metrics)$"
"""URLs without traces, which are asked again and again."""


class TraceSettingError(ValueError):
    """A variable of OpenTelemetry has a value that cannot be used here."""


@dataclass(frozen=True, slots=True)
class Collector:
    """Where traces go."""

    endpoint: str
    protocol: str


def find_collector(environment: Mapping[str, str] | None = None) -> Collector | None:
    """The collector that the standard variables name; None when traces are off. `TraceSettingError` for a value of
    theirs that cannot be used.
    """
    env = os.environ if environment is None else environment
    kind = env.get("OTEL_TRACES_EXPORTER", "otlp")
    own, common = env.get(f"{PREFIX}TRACES_ENDPOINT", ""), env.get(f"{PREFIX}ENDPOINT", "")
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true" or kind == "none" or not (own or common):
        return None
    if kind != "otlp":
        raise TraceSettingError(f"OTEL_TRACES_EXPORTER={kind!r}: expected 'otlp' or 'none'")
    protocol = env.get(f"{PREFIX}TRACES_PROTOCOL") or env.get(f"{PREFIX}PROTOCOL") or PROTOCOLS[0]
    if protocol not in PROTOCOLS:
        raise TraceSettingError(f"{PREFIX}PROTOCOL={protocol!r}: expected {' or '.join(PROTOCOLS)}")
    path = "" if protocol == "grpc" else "/v1/traces"
    return Collector(own or f"{common.rstrip('/')}{path}", protocol)


class Traces:
    """The traces of this process."""

    def __init__(self) -> None:
        self.provider: TracerProvider | None = None
        self._tracer = trace.get_tracer(NAME)

    def start(self, collector: Collector) -> None:
        """Send spans to the collector from now on, vLLM's of this process among them."""
        name = os.environ.get("OTEL_SERVICE_NAME", NAME)
        self.provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
        self.provider.add_span_processor(BatchSpanProcessor(_make_exporter(collector)))
        trace.set_tracer_provider(self.provider)
        set_global_response_propagator(TraceResponsePropagator())  # type: ignore[no-untyped-call]  # the library's
        self._tracer = self.provider.get_tracer(NAME)
        # vLLM reads these, in its own processes, too.
        os.environ[f"{PREFIX}TRACES_ENDPOINT"] = collector.endpoint
        os.environ[f"{PREFIX}TRACES_PROTOCOL"] = collector.protocol

    @contextmanager
    def span(self, name: str) -> Iterator[Any]:
        """A span around the block, a child of the request's; nothing while traces are off.

        Of an error it has the status or type alone: messages quote what clients have sent.
        """
        if self.provider is None:
            yield
            return
        with self._tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
            try:
                yield span
            except Exception as error:
                span.set_status(trace.StatusCode.ERROR)
                span.set_attribute("error.type", str(getattr(error, "status", type(error).__name__)))
                raise

    def describe(self, **attributes: str) -> None:
        """Put attributes, as `fusion.NAME`, on the span that is being made."""
        if self.provider is not None:
            trace.get_current_span().set_attributes({f"fusion.{name}": value for name, value in attributes.items()})


traces = Traces()


def _make_exporter(collector: Collector) -> SpanExporter:
    if collector.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=collector.endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter(endpoint=collector.endpoint)


def traced(name: str) -> Callable[[F], F]:
    """A decorator: each call of the function, or coroutine function, is a span."""

    def decorate(call: F) -> F:
        @wraps(call)
        async def wait(*args: Any, **kwargs: Any) -> Any:
            with traces.span(name):
                return await call(*args, **kwargs)

        @wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            with traces.span(name):
                return call(*args, **kwargs)

        return cast("F", wait if inspect.iscoroutinefunction(call) else run)

    return decorate


class TraceEngine:
    """An ASGI app around vLLM's: its part of a request is a span, of which vLLM's own are children."""

    def __init__(self, app: ASGIApp, is_trial: Callable[[], bool]) -> None:
        """`is_trial` says of the request at hand that nothing of it is computed."""
        self._app = app
        self._is_trial = is_trial

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with the context of the span in its headers."""
        if traces.provider is None or scope["type"] != "http" or self._is_trial():
            await self._app(scope, receive, send)
            return
        with traces.span("engine"):
            context: dict[str, str] = {}
            propagate.inject(context)
            names = {name.encode() for name in (*context, "traceparent", "tracestate")}
            headers = [pair for pair in scope["headers"] if pair[0] not in names]
            headers += [(name.encode(), value.encode()) for name, value in context.items()]
            await self._app({**scope, "headers": headers}, receive, send)
