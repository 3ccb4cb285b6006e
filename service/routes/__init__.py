"""The service's own HTTP routes, one file per noun; vLLM's are behind the gate."""

import json
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Scope

from service.routes.schemas import ErrorAnswer

if TYPE_CHECKING:
    from service.fusion_service import FusionService

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request is at fault; `message` says where and what to do"},
    "5XX": {"model": ErrorAnswer, "description": "The server is at fault, or is starting or stopping"},
}
"""What any route may answer besides success."""


class JsonRequest(Request):
    """A request whose body must be JSON that can be answered with: in UTF-8, without NaN and half surrogates."""

    async def json(self) -> Any:
        """The parsed body; 400 when it is not such JSON."""
        try:
            body = json.loads(await self.body())
            json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"The request body is not valid JSON: {error}.") from error
        return body


class OwnRoute(APIRoute):
    """A route whose body is JSON whatever the content type says (curl's default says form); GET answers HEAD too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, its body read by `JsonRequest`."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            scope = request.scope
            if self.body_field is not None:
                headers = [(key, value) for key, value in scope["headers"] if key != b"content-type"]
                scope = {**scope, "headers": [*headers, (b"content-type", b"application/json")]}
            return await handle(JsonRequest(scope, request.receive))

        return handle_json

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether this route takes the request; HEAD is what GET takes."""
        if scope.get("method") == "HEAD":
            match, child = super().matches({**scope, "method": "GET"})
            return match, {**child, "method": "GET"} if match is Match.FULL else child
        return super().matches(scope)


def make_router(tag: str, prefix: str = "") -> APIRouter:
    """A router for the routes of one noun; `tag` groups them in the API's description."""
    return APIRouter(prefix=prefix, tags=[tag], route_class=OwnRoute, responses=ERRORS)


async def get_service(request: Request) -> "FusionService":
    """The service that the app answers for."""
    service: FusionService = request.app.state.service
    return service


Service = Annotated["FusionService", Depends(get_service)]
