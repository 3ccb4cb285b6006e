"""One error class, and the one place that turns errors into OpenAI's error shape."""

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
    404: "NotFoundError",
    409: "ConflictError",
    413: "TooLargeError",
}


class ApiError(Exception):
    """An answer other than success: HTTP `status`, a sentence, the request key it is about, further headers."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = headers


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
            return ApiError(503, f"The registry's database failed: {type(error).__name__}.")
        case OSError():  # its text would show a path of this machine
            return ApiError(507, f"The server's disk failed: {error.strerror or type(error).__name__}.")
    return ApiError(500, f"{type(error).__name__}: {error}", param=param)


def error_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = TYPES.get(error.status, "InternalServerError" if error.status >= 500 else "BadRequestError")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.status}}


def error_response(error: Exception) -> JSONResponse:
    """The HTTP answer for `error`."""
    api = api_error(error)
    return JSONResponse(error_body(api), status_code=api.status, headers=api.headers)
