"""The service's own HTTP routes, one file per noun; vLLM's are behind the gate."""

import json
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.convertors import Convertor, register_url_convertor
from starlette.routing import Match
from starlette.types import Scope

from service.body import parse_body
from service.clients import identify_client
from service.errors import ApiError
from service.profiles import PROFILE_ROUTES
from service.routes.state_schemas import ErrorAnswer

if TYPE_CHECKING:
    from service.fusion_service import FusionService


class NameConvertor(Convertor[str]):
    """A name in a path, with its slashes."""

    regex = ".+"

    def convert(self, value: str) -> str:
        """The name itself."""
        return value

    def to_string(self, value: str) -> str:
        """The name itself."""
        return value


class ProfileConvertor(NameConvertor):
    """A profile's name in a path that ends with it, unlike those of its other routes."""

    regex = rf"(?!.*/(?:{'|'.join(PROFILE_ROUTES)})$).+"


register_url_convertor("name", NameConvertor())
register_url_convertor("profile", ProfileConvertor())

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
            body = parse_body(await self.body() or b"null")
            json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        except ApiError as error:
            raise HTTPException(error.status, error.message) from error  # the only kind that FastAPI lets through
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"The request body is not valid JSON: {error}.") from error
        return body


class OwnRoute(APIRoute):
    """A route whose body must be good JSON; GET answers HEAD too. One client gets a share of what all of them wait
    for: the database, the threads, the registry's lock.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, its body read by `JsonRequest`; 429 when the client has its share in progress."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            shares, client = request.app.state.shares, await get_client(request)
            if not shares.take(client):
                message = "Too many management requests are in progress, or most are from this client; try again."
                raise ApiError(429, message)
            try:
                return await handle(JsonRequest(request.scope, request.receive))
            finally:
                shares.free(client)

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


async def get_client(request: Request) -> str:
    """Who sends the request."""
    service: FusionService = request.app.state.service
    return identify_client(request.scope, keyed=service.engine.keys is not None, fair=service.settings.fairness_id)


Client = Annotated[str, Depends(get_client)]
Service = Annotated["FusionService", Depends(get_service)]
