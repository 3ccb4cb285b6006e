"""The lists of vLLM's routes against vLLM's real app, in both directions."""

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from vllm.entrypoints.launchers.app import build_app
from vllm.utils.argparse_utils import FlexibleArgumentParser

from service.engine.cli import cli
from service.engine.patches import remove_cors, remove_key_check
from service.engine.routes import SERVED, UNSERVED, keep_served, route_keys
from service.engine.supported import UnknownVllmError


def vllm_app(*flags: str) -> FastAPI:
    args = cli.make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-scale-out", *flags])
    app: FastAPI = build_app(args, ("generate",))
    return app


def paths(app: FastAPI) -> set[tuple[str, str]]:
    return {key for route in app.routes for key in route_keys(route)}


def test_every_route_of_vllm_s_app_is_listed_and_every_listed_one_is_there() -> None:
    assert not SERVED.keys() & UNSERVED.keys()
    assert paths(vllm_app()) == SERVED.keys() | UNSERVED.keys()


def test_only_served_routes_are_kept() -> None:
    app = vllm_app()

    @app.get("/new")
    @app.api_route("/health", methods=["GET", "PURGE"])
    async def new() -> None:
        """What another vLLM may add: a route, and a method of a path."""

    keep_served(app)
    assert paths(app) == SERVED.keys()


def test_a_vllm_without_a_listed_route_is_refused() -> None:
    with pytest.raises(UnknownVllmError, match="has no"):
        keep_served(FastAPI())


def test_vllm_asks_for_no_key_of_its_own() -> None:
    app = vllm_app("--api-key", "x")
    assert TestClient(app).get("/v1/models").status_code == 401
    remove_key_check(app)
    keep_served(app)
    assert TestClient(app).get("/v1/models").status_code == 404


def test_vllm_adds_no_cors_headers_of_its_own() -> None:
    app = vllm_app()
    remove_cors(app)
    assert "vary" not in TestClient(app).get("/version", headers={"origin": "https://evil.example"}).headers
    with pytest.raises(UnknownVllmError, match="CORSMiddleware"):
        remove_cors(app)
