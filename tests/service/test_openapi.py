"""The one document of the API: valid, whole, and made without an engine."""

import asyncio
import json
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openapi_spec_validator import OpenAPIV31SpecValidator

from service.edge.access import BENTOML_PATHS, OPEN_PATHS
from service.engine.openapi import text_routes
from service.routes import docs
from service.routes.openapi import OWN_ROUTERS, build_document
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return build_document([route for router in OWN_ROUTERS for route in router.routes], text_routes())


def test_the_document_is_valid_openapi_and_holds_every_route(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()
    routes = [*text_routes(), *(route for router in OWN_ROUTERS for route in router.routes)]
    paths = {getattr(route, "path_format", "") or getattr(route, "path", "") for route in routes}
    assert document["paths"].keys() - paths == set(BENTOML_PATHS)
    assert not paths - document["paths"].keys()


def test_the_document_describes_errors_keys_and_what_a_fusion_adds(document: dict[str, Any]) -> None:
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert {"x-fusion-digest", "x-fusion-mode"} <= chat["responses"]["200"]["headers"].keys()
    assert {"$ref": "#/components/schemas/FusionKeys"} in chat["requestBody"]["content"]["application/json"]["schema"][
        "allOf"
    ]
    assert document["components"]["schemas"]["FusionKeys"]["properties"].keys() == {"fusion", "strict", "receipt"}
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    paths = document["paths"]
    keyless = {path for path in paths if any(one.get("security") == [] for one in paths[path].values())}
    assert keyless == {*OPEN_PATHS} & paths.keys()
    for path, operations in paths.items():
        for method, operation in operations.items():
            assert {"summary", "tags"} <= operation.keys(), (method, path)
    shape = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    for path, method in (("/v1/adapters", "get"), ("/v1/load_lora_adapter", "post")):  # the second answers with text
        assert document["paths"][path][method]["responses"]["4XX"]["content"] == shape
    assert document["components"]["schemas"]["ErrorAnswer"]["required"] == ["error"]


def test_the_document_has_the_project_s_version(document: dict[str, Any]) -> None:
    assert f'version = "{document["info"]["version"]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_command_line_writes_the_same_routes(document: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "service.routes.openapi"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Not the whole: pydantic names equal models of one name by what the process has seen before.
    assert json.loads(done.stdout)["paths"].keys() == document["paths"].keys()


async def test_the_document_is_made_once_for_all_who_ask(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    def build(*routes: object) -> dict[str, Any]:
        built.append(1)
        time.sleep(0.1)
        return {"openapi": "3.1.0"}

    monkeypatch.setattr(docs, "build_document", build)
    app = FastAPI(openapi_url=None)
    engine: Any = SimpleNamespace(app=FastAPI(), args=SimpleNamespace(disable_fastapi_docs=False))
    docs.add_routes(app, engine, "/docs/assets")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
        answers = await asyncio.gather(*(http.get("/openapi.json") for _ in range(20)))
    assert [answer.json() for answer in answers] == [{"openapi": "3.1.0"}] * 20
    assert len(built) == 1
