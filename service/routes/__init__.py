"""The service's own HTTP routes, one file per noun; vLLM's are behind the gate."""

import json
import secrets
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request, Response
from fastapi.routing import APIRoute
from starlette.convertors import Convertor, register_url_convertor
from starlette.routing import Match
from starlette.types import Scope

from service.audit import Actor, current_actor
from service.body import parse_body
from service.callers import Caller, find_caller
from service.clients import identify_client
from service.conditions import Condition, read_tags
from service.edge.clients import MAX_NAME
from service.errors import ApiError
from service.profiles import PROFILE_ROUTES
from service.resolve import Names
from service.roles import check_role
from service.routes.state_schemas import ErrorAnswer
from service.tenants import check_tenant, is_operator

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

# Not as `model`: of a route that answers with plain text, FastAPI would take its errors for that, too.
_ERROR = {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"content": _ERROR, "description": "The request is at fault; `message` says where and what to do"},
    "5XX": {"content": _ERROR, "description": "The server is at fault, or is starting or stopping"},
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
    """A route whose body must be good JSON, for callers with its role; GET answers HEAD too. One client gets a share of
    what all of them wait for: the database, the threads, the registry's lock.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, its body read by `JsonRequest`; 429 when the client has its share in progress."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            check_role(request.scope, self.path)
            shares, client = request.app.state.shares, await get_client(request)
            if not shares.take(client):
                message = "Too many management requests are in progress, or most are from this client; try again."
                raise ApiError(429, message)
            # uvicorn starts a pipelined request in the context of the one before it.
            current_actor.set(actor := find_actor(request))
            try:
                response = await handle(JsonRequest(request.scope, request.receive))
                if request.method not in ("GET", "HEAD"):
                    response.headers.setdefault("x-request-id", actor.request)
                return response
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


def find_actor(request: Request) -> Actor:
    """Who makes what this request changes, for the audit; a request without an id gets one."""
    caller = find_caller(request.scope)
    address = request.client.host[:MAX_NAME] if request.client else ""
    id_ = request.headers.get("x-request-id") or secrets.token_hex(8)
    return Actor(caller.key, caller.role, caller.tenant, address, id_)


async def get_service(request: Request) -> "FusionService":
    """The service that the app answers for."""
    service: FusionService = request.app.state.service
    return service


async def get_client(request: Request) -> str:
    """Who sends the request."""
    service: FusionService = request.app.state.service
    return identify_client(request.scope, fair=service.settings.fairness_id)


async def get_tenant(
    request: Request,
    tenant: Annotated[str | None, Query(description="whose things are meant; for the operator's admins alone")] = None,
) -> str:
    """Whose things the request is about: its caller's, or what an admin of the operator asks for."""
    caller = find_caller(request.scope)
    if tenant is None or tenant == caller.tenant:
        return caller.tenant
    if not is_operator(caller):
        raise ApiError(403, "Only an admin of the operator may name a tenant; leave it out.", param="tenant")
    try:
        return check_tenant(tenant)
    except ValueError as error:
        raise ApiError(400, f"{error}.", param="tenant") from error


async def get_caller(request: Request) -> Caller:
    """Who sends the request, as its key says."""
    return find_caller(request.scope)


async def get_names(request: Request, tenant: Annotated[str, Depends(get_tenant)]) -> Names:
    """The names that the tenant sees."""
    service: FusionService = request.app.state.service
    return service.names.view(tenant)


async def get_condition(
    request: Request,
    if_match: Annotated[list[str] | None, Header(description="change only what has one of these ETags")] = None,
    if_none_match: Annotated[list[str] | None, Header(description="`*`: create only, change nothing there is")] = None,
) -> Condition:
    """What must hold for the request's change; 400 for a header that is neither `*` nor a list of entity tags. Before
    it returns, this replica catches up with the others, so that it knows the tags that they have just given out.
    """
    texts = [None if values is None else ", ".join(values) for values in (if_match, if_none_match)]
    for text, header in zip(texts, ("If-Match", "If-None-Match"), strict=True):
        if text is not None:
            read_tags(text, header)
    if texts != [None, None]:
        service: FusionService = request.app.state.service
        await service.registry.settle()
    return Condition(*texts)


Client = Annotated[str, Depends(get_client)]
Sender = Annotated[Caller, Depends(get_caller)]
When = Annotated[Condition, Depends(get_condition)]
SeenNames = Annotated[Names, Depends(get_names)]
Service = Annotated["FusionService", Depends(get_service)]
Tenant = Annotated[str, Depends(get_tenant)]
