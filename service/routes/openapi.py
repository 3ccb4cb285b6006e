"""One OpenAPI document: the service's own routes, vLLM's, and BentoML's health routes.

    python -m service.routes.openapi > openapi.json

writes it without starting an engine.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi.openapi.utils import get_openapi
from starlette.routing import BaseRoute, Match

from service.routes import adapters, audit, evidence, fusions, keys, models, policy, scorecards, state, whoami
from service.routes.schemas import FusionKeys
from service.routes.state_schemas import ErrorAnswer, Readiness

TITLE = "LoRA Fusion"
VERSION = "0.1.0"
DESCRIPTION = """\
OpenAI's API for any weighted combination of LoRA adapters. A request names a fusion in `model`, as a recipe
(`0.6*task + 0.4*safety`) or a profile (`balanced`, `balanced@3`), or in `fusion` beside the base model.
Errors have OpenAI's shape. With an API key set, every route requires it except the health checks and this
description; its role says what it may do. Bodies must have the content type `application/json`.
"""
OWN_ROUTERS = tuple(
    noun.router for noun in (adapters, fusions, models, policy, scorecards, evidence, state, keys, audit, whoami)
)
TAGS = [
    {"name": "Adapters", "description": "Register, inspect and remove LoRA adapters."},
    {"name": "Fusions", "description": "Profiles, which are named and versioned recipes, and dry runs."},
    {"name": "Models", "description": "What a request may name."},
    {"name": "Policy", "description": "Which combinations may answer whom."},
    {"name": "Scorecards", "description": "Measured results of a fusion."},
    {"name": "State", "description": "What the engine holds, and what of the limits is used."},
    {"name": "Keys", "description": "API keys and their roles."},
    {"name": "Audit", "description": "Who changed what."},
    {"name": "Inference", "description": "vLLM's routes that run a model; all of them take a fusion."},
    {"name": "Engine", "description": "vLLM's other routes."},
    {"name": "Health", "description": "For load balancers, without an API key, and for Prometheus."},
]
FUSION_HEADERS = {
    "x-fusion-digest": "identity of the fusion, the same for all spellings",
    "x-fusion-recipe": "canonical recipe, percent-encoded; absent when longer than 2 KiB",
    "x-fusion-mode": "`mixed` (weights applied per token) or `built` (a fused adapter)",
    "x-fusion-source": "`warm` (resident), `loaded` (from the store) or `built` (for this request)",
    "x-fusion-rank": "rank of the fusion",
    "x-fusion-error": "relative Frobenius error; 0 when mixed",
    "x-fusion-weights": "weights that a gate chose, by adapter, as JSON; a list of them for many prompts",
    "x-fusion-receipt": "what answers, signed, when the request has `receipt` or this header as `true`",
    "x-fusion-gate": "`chose`, or `default` and why the gate's own weights were not used",
}
KEYLESS = ("/health", "/ping")
REF = "#/components/schemas/"


def build_document(own: Iterable[BaseRoute], vllm: Iterable[BaseRoute]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of an app with the routes `own` and, where none of them matches, `vllm`."""
    own = list(own)
    behind = [route for route in vllm if not _is_hidden(getattr(route, "path", ""), own)]
    document = get_openapi(
        title=TITLE,
        version=VERSION,
        description=DESCRIPTION,
        routes=[*behind, *own],
        tags=TAGS,
        license_info={"name": "MIT", "identifier": "MIT"},
    )
    paths, components = document["paths"], document["components"]
    for model in (ErrorAnswer, FusionKeys, Readiness):
        schema = model.model_json_schema(ref_template=f"{REF}{{model}}")
        components["schemas"] |= schema.pop("$defs", {}) | {model.__name__: schema}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}, {}]  # the second: servers without keys
    for path in {getattr(route, "path_format", "") for route in behind} & paths.keys():
        for method, operation in paths[path].items():
            takes_fusion = method == "post" and _has_model(operation, components["schemas"])
            operation["tags"] = ["Inference" if takes_fusion else "Engine"]
            if takes_fusion:
                _add_fusion(operation)
            if path in KEYLESS and method == "get":
                operation["security"] = []
    return document | {"paths": paths | _health_paths()}


def _is_hidden(path: str, own: Sequence[BaseRoute]) -> bool:
    scope = {"type": "http", "method": "GET", "path": path, "root_path": ""}
    return path in _health_paths() or any(route.matches(scope)[0] is not Match.NONE for route in own)


def _has_model(operation: dict[str, Any], schemas: dict[str, Any]) -> bool:
    """Whether the body, or a form of it, has the key `model`."""
    names = re.findall(f'"{REF}([^"]+)"', json.dumps(operation.get("requestBody", {})))
    return any("model" in schemas[name].get("properties", {}) for name in names)


def _add_fusion(operation: dict[str, Any]) -> None:
    keys = {"$ref": f"{REF}{FusionKeys.__name__}"}
    for content in operation["requestBody"]["content"].values():
        content["schema"] = {"allOf": [content["schema"], keys]}
    operation["responses"]["200"]["headers"] = {
        name: {"schema": {"type": "string"}, "description": f"{text}; absent for the plain base"}
        for name, text in FUSION_HEADERS.items()
    }


def _health_paths() -> dict[str, Any]:
    """BentoML's routes, which it describes nowhere."""

    def get(summary: str, media: str = "text/plain", **schema: Any) -> dict[str, Any]:
        answer = {"description": summary, "content": {media: {"schema": schema}}}
        return {"get": {"tags": ["Health"], "summary": summary, "responses": {"200": answer, "503": answer}}}

    def get_open(summary: str, media: str = "text/plain", **schema: Any) -> dict[str, Any]:
        return {"get": get(summary, media, **schema)["get"] | {"security": []}}

    readiness = {"$ref": f"{REF}{Readiness.__name__}"}
    return {
        "/livez": get_open("Report whether the server is alive"),
        "/healthz": get_open("Same as /livez"),
        "/readyz": get_open("Report whether requests are accepted", "application/json", **readiness),
        "/metrics": get("Prometheus series"),
    }


def main() -> None:
    """Print the document of the routes of a text model."""
    from service.engine.openapi import text_routes

    own = [route for router in OWN_ROUTERS for route in router.routes]
    json.dump(build_document(own, text_routes()), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
