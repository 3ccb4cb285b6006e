"""BentoML's replaced parts: each is checked before it is replaced, and again in the app that BentoML builds."""

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.testclient import TestClient

from service.bento import patches
from service.bento.app import LoraFusion

HTTP = "bentoml._internal.server.http"
PLACES = {
    name: f"{HTTP}.{room}.{name}" for name, room in ((patches.METRICS, "instruments"), (patches.TIMEOUT, "traffic"))
}


def built_app() -> Starlette:
    """BentoML's app around the service, its middleware built as for a first request."""
    service: Any = LoraFusion  # what BentoML's decorator makes of the class
    app: Starlette = service.to_asgi()
    app.middleware_stack = app.build_middleware_stack()
    return app


def test_every_replacement_takes_effect_in_bentomls_own_app() -> None:
    patches.check_effect(built_app())


@pytest.mark.parametrize("name", PLACES)
def test_a_bentoml_that_runs_its_own_class_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, _ = patches.replaced[name]
    monkeypatch.setattr(PLACES[name], original)
    with pytest.raises(patches.UnsupportedBentoMLError, match=f"{name}: the patches had no effect"):
        patches.check_effect(built_app())


@pytest.mark.parametrize("name", PLACES)
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
    app = Starlette(middleware=[Middleware(patches.NoTimeout, timeout=1)])
    app.middleware_stack = app.build_middleware_stack()
    patches.check_effect(app)


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


@pytest.fixture(scope="module")
def http() -> TestClient:
    return TestClient(built_app())  # one only: its metrics are registered at the first request, once a process


@pytest.mark.parametrize("path", ["/", "/docs", "/docs.json", "/openapi.json", "/static_content/swagger-ui.css"])
def test_bentomls_own_pages_are_hidden_by_the_front(http: TestClient, path: str) -> None:
    answer = http.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, 503)  # the front's, before its start


def test_readyz_is_the_front_s_readiness(http: TestClient) -> None:
    answer = http.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"ready": False})


def test_request_metrics_are_counted_under_bounded_paths(http: TestClient) -> None:
    http.get("/invented/by/a/client")
    text = http.get("/metrics").text
    assert 'endpoint="(other)"' in text
    assert "invented" not in text
