"""One error class, and the one place that turns errors into OpenAI's error shape."""

import errno
import re
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from adapters import AdapterError, FusionError, RecipeError, UnknownAdapterError
from service.validation import describe_fault

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    408: "TimeoutError",
    409: "ConflictError",
    412: "PreconditionFailedError",
    413: "TooLargeError",
    414: "TooLargeError",
    415: "UnsupportedMediaTypeError",
    421: "MisdirectedRequestError",
    429: "RateLimitError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
}

RETRY_AFTER_S = 5
"""When a request that could not be taken may come again."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
"""Of OSError: the others, as of connections and timeouts, say nothing about the disk."""
PATHS = re.compile(r"(?<![\w.…])/(?:[\w.@+~-]+/)+")
"""Folders of absolute paths."""


class ApiError(Exception):
    """An answer other than success: HTTP `status`, a sentence, the request key it is about, further headers.

    A 429 and a 503 have the header `Retry-After`: they pass by themselves.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = {name.lower(): value for name, value in (headers or {}).items()}
        if status in (429, 503):
            self.headers.setdefault("retry-after", str(RETRY_AFTER_S))


def damaged_adapter(name: str, reason: str) -> ApiError:
    """The 500 for an adapter whose row of the registry cannot be read."""
    return ApiError(500, f"The record of adapter {name!r} is damaged: {reason}; delete and re-register it.")


def damaged_profile(name: str, reason: str) -> ApiError:
    """The 500 for a profile, or a version of it, that cannot be read or served."""
    return ApiError(500, f"Profile {name!r} is damaged: {reason}; PUT or roll it back to a good version, or delete it.")


def public_entry(name: str, owner: str) -> ApiError:
    """The 403 for a tenant that would change or delete what is public; `owner` says what it is ('a profile')."""
    message = f"{name!r} is {owner} that is public: only the operator may change or delete it; choose another name."
    return ApiError(403, message, param="name")


def api_error(error: Exception, *, param: str | None = None) -> ApiError:
    """`error` as an `ApiError`: bad bodies, recipes and adapters are 400, unknown names 404, the rest 500."""
    match error:
        case ApiError():
            return error
        case UnknownAdapterError():
            return ApiError(404, str(error), param=param)
        case RecipeError() | AdapterError() | FusionError():
            return ApiError(400, str(error), param=param)
        case RequestValidationError():
            # FastAPI puts the part of the request first: body, path, …
            message, param = describe_fault([{**fault, "loc": fault["loc"][1:]} for fault in error.errors()])
            return ApiError(400, message, param=param)
        case HTTPException():  # Starlette's, for multipart bodies among others
            return ApiError(error.status_code, error.detail, param=param, headers=error.headers)
        case SQLAlchemyError():  # its text would show the statement and its values
            message = f"The registry's database failed: {type(error).__name__}; try again."
            return ApiError(503, message)
        case OSError() if error.errno in DISK_ERRORS:  # its text would show a path of this machine
            return ApiError(507, f"The server's disk failed: {error.strerror}.")
    # Its text may show what is inside; the log has it.
    return ApiError(500, f"Internal server error ({type(error).__name__}); see the server log.", param=param)


def hide_paths(message: str) -> str:
    """`message` without the folders of absolute paths: they tell where things are on this machine."""
    return PATHS.sub("…/", message)


def error_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = TYPES.get(error.status, "InternalServerError" if error.status >= 500 else "BadRequestError")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.status}}


def error_response(error: Exception) -> JSONResponse:
    """The HTTP answer for `error`."""
    api = api_error(error)
    return JSONResponse(error_body(api), status_code=api.status, headers=api.headers)
