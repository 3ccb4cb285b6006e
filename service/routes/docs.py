"""`/openapi.json` and `/docs`: one description of the service's own routes and of vLLM's, readable offline."""

import asyncio
from functools import cache
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from service.engine.openapi import SWAGGER_UI
from service.routes.openapi import TITLE, build_document

if TYPE_CHECKING:
    from service.engine.server import Engine


class Assets(StaticFiles):
    """Whole files: errors of ranges would not have the shape of all errors."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as if no range were asked for, which a server may do."""
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)


def add_routes(app: FastAPI, engine: "Engine", assets_path: str) -> None:
    """Describe what `app` and the engine's app behind it answer; vLLM's `--disable-fastapi-docs` turns it off."""
    if engine.args.disable_fastapi_docs:
        return
    render = cache(lambda: bytes(JSONResponse(build_document(app.routes, engine.app.routes)).body))
    lock = asyncio.Lock()  # it is built once, however many ask at the same time

    async def show_document(request: Request) -> Response:
        async with lock:
            return Response(await asyncio.to_thread(render), media_type="application/json")

    async def show_page(request: Request) -> Response:
        page = get_swagger_ui_html(
            openapi_url="openapi.json",
            title=TITLE,
            swagger_js_url=f".{assets_path}/swagger-ui-bundle.js",
            swagger_css_url=f".{assets_path}/swagger-ui.css",
            swagger_favicon_url="data:,",  # FastAPI's own is a request to its site
        )
        page.headers["content-security-policy"] = "frame-ancestors 'none'"  # its buttons send requests
        return page

    app.mount(assets_path, Assets(directory=SWAGGER_UI))
    app.add_route("/openapi.json", show_document)
    app.add_route("/docs", show_page)
