"""BentoML's replaced parts: each is checked before it is replaced, and again in the app that BentoML builds."""

from typing import Any

import pytest
import uvicorn.config
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.bento import patches
from service.bento.app import LoraFusion, front
from service.edge.access import BENTOML_PATHS, Access
from service.edge.connections import Connections, derive_limits
from service.routes import page
from service.settings import Settings
from tests.service.edge_app import CORS, SITE, answer_ok, identify_right, status as read_status

BENTOML_PAGES = ("/", "/docs.json", "/schema.json", "/static_content/swagger-ui.css")
HTTP = "bentoml._internal.server.http"
PLACES = {
    name: f"{HTTP}.{room}.{name}"
    for name, room in ((patches.METRICS, "instruments"), (patches.TIMEOUT, "traffic"), (patches.ACCESS, "access"))
} | {patches.TRACES: f"opentelemetry.instrumentation.asgi.{patches.TRACES}"}


def built_app() -> Starlette:
    """BentoML's app around the service, its middleware built as for a first request."""
    service: Any = LoraFusion  # what BentoML's decorator makes of the class
    app: Starlette = service.to_asgi()
    patches.remove_routes(app)
    app.middleware_stack = app.build_middleware_stack()
    return app


def test_bentoml_s_app_keeps_the_listed_routes_only() -> None:
    assert sorted(getattr(route, "path", "?") for route in built_app().routes) == ["", *sorted(BENTOML_PATHS)]


def test_every_replacement_takes_effect_in_bentomls_own_app() -> None:
    patches.check_effect(built_app())


@pytest.mark.parametrize("name", PLACES)
def test_a_bentoml_that_runs_its_own_class_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, _ = patches.replaced[name]
    monkeypatch.setattr(PLACES[name], original)
    with pytest.raises(patches.UnsupportedBentoMLError, match=f"{name}: the patches had no effect"):
        patches.check_effect(built_app())


@pytest.mark.parametrize("name", [patches.METRICS, patches.TIMEOUT])  # the access log may be off
def test_a_bentoml_that_runs_neither_class_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def __init__(self, app: Any, **options: Any) -> None:
            self.app = app

    monkeypatch.setattr(PLACES[name], Other)
    with pytest.raises(patches.UnsupportedBentoMLError, match=name):
        patches.check_effect(built_app())


def test_a_bentoml_that_never_shows_its_app_is_refused() -> None:
    with pytest.raises(patches.UnsupportedBentoMLError, match="had no effect"):
        patches.check_effect(None)


def test_metrics_may_be_off_in_bentomls_configuration() -> None:
    traces: Any = patches.replaced[patches.TRACES][1]
    app = Starlette(middleware=[Middleware(patches.NoTimeout, timeout=1), Middleware(traces)])
    app.middleware_stack = app.build_middleware_stack()
    patches.check_effect(app)


def test_a_stream_is_one_span_however_many_messages_it_has() -> None:
    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for more in (True, True, False):
            await send({"type": "http.response.body", "body": b"x", "more_body": more})

    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    traced = patches.replaced[patches.TRACES][1](stream, tracer_provider=provider)
    assert TestClient(traced).get("/").text == "xxx"
    assert len(spans.get_finished_spans()) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("is_traced", [False, True])
async def test_no_bytes_of_a_stranger_fail_before_the_checks_or_are_traced(is_traced: bool) -> None:
    heads: list[Scope] = []

    async def see(scope: Scope, receive: Receive, send: Send) -> None:
        heads.append(scope)
        await answer_ok(scope, receive, send)

    spans, provider = InMemorySpanExporter(), TracerProvider() if is_traced else None
    if provider is not None:
        provider.add_span_processor(SimpleSpanProcessor(spans))
    traced = patches.replaced[patches.TRACES][1](see, tracer_provider=provider)
    secret = "Abc_" * 10 + "-xy"
    headers = [(name, b"\xff\\x[") for name in (b"host", b"user-agent", b"traceparent", b"tracestate", b"baggage")]
    sent = {"query_string": f"key={secret}&".encode() + b"\xff", "path": f"/v1/models/lf-0f3a5c7e9b1d-{secret}"}
    assert await read_status(traced, headers, **sent) == 200
    assert heads[0]["headers"] == headers
    assert {key: heads[0][key] for key in sent} == sent
    assert len(spans.get_finished_spans()) == is_traced
    assert secret not in str([dict(span.attributes or {}) for span in spans.get_finished_spans()])


def test_metrics_in_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prometheus_client.values.ValueClass", object)
    with pytest.raises(patches.UnsupportedBentoMLError, match="keeps metrics in files"):
        patches.check_effect(built_app())


def test_a_bentoml_without_a_replaced_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PLACES[patches.METRICS])
    with pytest.raises(patches.UnsupportedBentoMLError, match=f"has no .*{patches.METRICS}"):
        patches.install(str)


def test_a_replaced_name_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PLACES[patches.METRICS], lambda app, labels: None)
    with pytest.raises(patches.UnsupportedBentoMLError, match=r"takes \(app, labels\), expected \(app, namespace"):
        patches.install(str)


def test_another_version_is_refused() -> None:
    with pytest.raises(patches.UnsupportedBentoMLError, match=r"9\.9.*1\.4\.39"):
        patches.check_version("9.9")


def test_uvicorn_with_a_protocol_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", "uvicorn.protocols.http.auto:AutoHTTPProtocol")
    with pytest.raises(patches.UnsupportedBentoMLError, match="does not make its connections"):
        patches.check_effect(built_app())


@pytest.mark.parametrize("name", ["on_body", "_unsupported_upgrade_warning"])
def test_a_uvicorn_without_an_extended_method_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(HttpToolsProtocol, name)
    with pytest.raises(patches.UnsupportedBentoMLError, match=name):
        patches.bound_connections(Connections(lambda: derive_limits(Settings())))


def test_a_uvicorn_without_a_field_that_is_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestResponseCycle, "__init__", lambda self: None)
    with pytest.raises(patches.UnsupportedBentoMLError, match="has no transport"):
        patches.bound_connections(Connections(lambda: derive_limits(Settings())))


@pytest.mark.anyio
async def test_no_client_is_believed_to_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    patches.bound_connections(Connections(lambda: derive_limits(Settings())))
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["client"][0])

    config = uvicorn.Config(app)
    trust = ProxyHeadersMiddleware(app, config.forwarded_allow_ips)
    for host in ("127.0.0.1", "::1", ""):
        scope: Any = {"type": "http", "client": (host, 1), "headers": [(b"x-forwarded-for", b"10.0.0.1")]}
        await trust(scope, None, None)  # type: ignore[arg-type]  # not used
    assert seen == ["127.0.0.1", "::1", ""]


def test_bentoml_refuses_no_request_in_a_shape_of_its_own() -> None:
    layer, names = built_app().middleware_stack, []
    while layer is not None:
        names.append(type(layer).__name__)
        layer = getattr(layer, "app", None)
    assert {"LimitBodies", "LimitRequests"} <= set(names)
    assert "MaxConcurrencyMiddleware" not in names


@pytest.mark.parametrize(("files", "connections"), [(20_000, 2048), (1024, 512)])
def test_connections_take_at_most_half_of_the_files(
    files: int, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (files, files))
    assert derive_limits(Settings()).connections == connections


@pytest.fixture(scope="module")
def http() -> TestClient:
    return TestClient(built_app())  # one only: its metrics are registered at the first request, once a process


@pytest.mark.parametrize("path", [*BENTOML_PAGES, "/docs", "/openapi.json", "/assets/x"])
def test_bentomls_own_pages_are_hidden_by_the_front(http: TestClient, path: str) -> None:
    answer = http.get(path)
    if path == "/":
        assert answer.text == (page.FOLDER / page.INDEX).read_text()
        return
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, 503)  # the front's, before its start


def test_readyz_is_the_front_s_readiness(http: TestClient) -> None:
    answer = http.get("/readyz")
    assert (answer.status_code, answer.json()["state"]) == (503, "starting")
    assert int(answer.headers["retry-after"]) > 0


def test_request_metrics_are_counted_under_bounded_paths(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "access", Access(started=True))
    http.get("/invented/by/a/client")
    text = http.get("/metrics").text
    assert 'endpoint="(other)"' in text
    assert "invented" not in text


def test_a_content_type_of_any_bytes_gets_its_whole_answer(http: TestClient) -> None:
    answer = http.get("/v1/models", headers={b"content-type": b"\xff\xfe"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, 503)


def test_the_whole_app_asks_for_the_key_and_lets_allowed_origins_read(
    http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = Access(started=True, identify=identify_right, cors=CORS)
    monkeypatch.setattr(front, "access", access)
    site, key = {"origin": SITE}, {"authorization": "Bearer right"}
    for path, known in (("/metrics", 200), ("/schema.json", 503), ("/v1/models", 503)):
        for headers, status in ((site, 401), (site | key, known)):
            answer = http.get(path, headers=headers)
            assert (answer.status_code, answer.headers.get_list("access-control-allow-origin")) == (status, [SITE])
        assert http.get(path, headers=key | {"origin": "https://evil.example"}).status_code == 403
    for path in ("/livez", "/readyz", "/healthz"):
        assert http.get(path, headers=site).headers["access-control-allow-origin"] == SITE
    asked = {"access-control-request-method": "GET", "access-control-request-headers": "authorization"}
    assert http.options("/v1/models", headers=site | asked).status_code == 200
