"""The one document of the API: valid, whole, and made without an engine."""

import json
import subprocess
import sys
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from service.engine.openapi import text_routes
from service.front import HEALTH_PATHS, OPEN_PATHS
from service.routes.openapi import OWN_ROUTERS, build_document
from tests.conftest import ROOT

HIDDEN = {
    "/openapi.json",  # the document itself, and the pages that show it
    "/docs",
    "/docs/oauth2-redirect",
    "/redoc",
    "/metrics/{path}",  # vLLM's mount, behind BentoML's /metrics
    "/v1/chat/completions/render",  # vLLM's own choice: parts of its disaggregated serving
    "/v1/messages/render",
    "/v1/completions/render",
    "/v1/responses/render",
    "/v1/chat/completions/derender",
    "/v1/completions/derender",
    "/inference/v1/generate",
    "/inference/v1/abort_requests",
}
"""Routes that the document leaves out."""


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return build_document([route for router in OWN_ROUTERS for route in router.routes], text_routes())


def test_the_document_is_valid_openapi_and_holds_every_route(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()
    routes = [*text_routes(), *(route for router in OWN_ROUTERS for route in router.routes)]
    paths = {getattr(route, "path_format", "") or getattr(route, "path", "") for route in routes}
    assert paths - document["paths"].keys() == HIDDEN


def test_the_document_describes_errors_keys_and_what_a_fusion_adds(document: dict[str, Any]) -> None:
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert {"x-fusion-digest", "x-fusion-mode"} <= chat["responses"]["200"]["headers"].keys()
    assert {"$ref": "#/components/schemas/FusionKeys"} in chat["requestBody"]["content"]["application/json"]["schema"][
        "allOf"
    ]
    assert document["components"]["schemas"]["FusionKeys"]["properties"].keys() == {"fusion", "strict"}
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    paths = document["paths"]
    keyless = {path for path in paths if any(one.get("security") == [] for one in paths[path].values())}
    assert keyless == {*HEALTH_PATHS, *OPEN_PATHS} & paths.keys()
    for path, operations in paths.items():
        for method, operation in operations.items():
            assert {"summary", "tags"} <= operation.keys(), (method, path)
    shape = document["paths"]["/v1/adapters"]["get"]["responses"]["4XX"]["content"]["application/json"]["schema"]
    assert shape == {"$ref": "#/components/schemas/ErrorAnswer"}


def test_the_document_has_the_project_s_version(document: dict[str, Any]) -> None:
    assert f'version = "{document["info"]["version"]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_command_line_writes_the_same_routes(document: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "service.routes.openapi"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Not the whole: pydantic names equal models of one name by what the process has seen before.
    assert json.loads(done.stdout)["paths"].keys() == document["paths"].keys()
