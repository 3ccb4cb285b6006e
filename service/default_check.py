"""Whether the routes accept a profile's defaults: each is asked what it makes of a short request that has them."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp

from service.body import check_counts
from service.defaults import with_defaults
from service.engine.dry_run import RefusedError, try_request
from service.errors import ApiError

TURN = {"role": "user", "content": "Hi"}
SHORTEST: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [TURN]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [TURN]},
}
"""What a request has at least, besides the fields that defaults fill."""
MODEL = "profile"
ACCEPTABLE: tuple[Mapping[str, Any], ...] = ({}, {"chat_template": "{{ messages[0].content }}"})
"""Defaults with which a route answers, unless something else is at fault; the second for bases without a template."""


async def check_defaults(app: ASGIApp, defaults: Mapping[str, Any]) -> None:
    """Raise `ApiError` 400 when a route of vLLM's `app` refuses requests for these defaults alone."""
    for path in SHORTEST if defaults else ():
        error = await _try(app, path, defaults)
        if error is None:
            continue
        fit = await _find_acceptable(app, path, defaults)
        if fit is None:  # no default is at fault
            continue
        keys = [key for key in defaults if await _try(app, path, {**fit, key: defaults[key]}) is not None]
        name = f"defaults.{keys[0]}" if keys else "defaults"
        message = f"{name!r} is refused by {path}, also with the shortest prompt: {error.message}"
        raise ApiError(error.status if error.status == 503 else 400, message, param=name)


async def _find_acceptable(app: ASGIApp, path: str, defaults: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first of the acceptable defaults, of those keys that `defaults` have too, with which `path` answers."""
    for fit in ACCEPTABLE:
        if fit.keys() <= defaults.keys() and await _try(app, path, fit) is None:
            return fit
    return None


async def _try(app: ASGIApp, path: str, defaults: Mapping[str, Any]) -> ApiError | None:
    """What `path` says to the shortest request with these defaults; None when it would answer."""
    # /v1/messages wants a limit from each request.
    body = with_defaults({"model": MODEL, **SHORTEST[path]}, {"max_tokens": 1, **defaults}, path)
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    try:
        check_counts(body)
        await try_request(app, scope, json.dumps(body).encode(), MODEL, defaults.get("chat_template"))
    except ApiError as error:
        return error
    except RefusedError as refused:
        return ApiError(refused.answer.status_code, refused.message)
    return None
