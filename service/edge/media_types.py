"""The content type of bodies: none that a web page may send without asking this server first.

Browsers send forms, plain text and bodies without a type to any site; for JSON, and for a header of our own, they
ask with a preflight request (https://fetch.spec.whatwg.org/#cors-safelisted-request-header).
"""

import re

from starlette.types import Scope

from service.edge.check import Check, header_values
from service.errors import ApiError
from service.validation import MAX_QUOTED

UPLOAD = ("POST", "/v1/adapters")
UPLOAD_HEADER = b"x-fusion-upload"
MULTIPART = "multipart/form-data"
WEIGHTS_TYPES = ("application/octet-stream", "application/vnd.safetensors", "application/x-safetensors")
"""Of an adapter's weights file."""
CHARSET = re.compile(r';[ \t]*charset=("?)utf-?8\1[ \t]*(?=;|\Z)')
"""The one charset of an upload's parts: Python knows others that take minutes, fail, or are remembered for ever."""


class MediaTypes(Check):
    """Answers 415 to bodies that are neither JSON nor an upload with its header."""

    def check(self, scope: Scope) -> None:
        """Raise `ApiError` when the request has a body of another type."""
        method = scope["method"]
        if method in ("GET", "HEAD", "OPTIONS") or not has_body(scope):
            return
        kind = media_type(scope)
        if is_json(kind):
            return
        types = [value.decode("latin-1") for value in header_values(scope, b"content-type")]
        if is_upload(scope):
            if header_values(scope, UPLOAD_HEADER) != [b"1"]:
                raise ApiError(415, f"An upload ({kind}) must have the header 'X-Fusion-Upload: 1'.")
            if "charset" in CHARSET.sub("", types[0].lower()):
                raise ApiError(415, f"The content type {types[0][:MAX_QUOTED]!r} may name no charset but utf-8.")
            return
        problem = (
            f"has the content type {types[0][:MAX_QUOTED]!r}" if len(types) == 1 else f"has {len(types)} content types"
        )
        if kind in (MULTIPART, *WEIGHTS_TYPES) and (method, scope["path"].removesuffix("/")) == UPLOAD:
            raise ApiError(415, f"An upload goes to {UPLOAD[1]!r}, without a final slash.")
        uploads = f", or '{MULTIPART}' or '{WEIGHTS_TYPES[0]}' with the header 'X-Fusion-Upload: 1'"
        upload = uploads if (method, scope["path"]) == UPLOAD else ""
        raise ApiError(415, f"The body {problem}; expected the header 'Content-Type: application/json'{upload}.")


def has_body(scope: Scope) -> bool:
    """Whether the head announces a body."""
    if header_values(scope, b"transfer-encoding"):
        return True
    return any(value.strip(b" \t0") for value in header_values(scope, b"content-length"))


def media_type(scope: Scope) -> str:
    """The media type of the body (lower case, without parameters); empty without just one."""
    types = header_values(scope, b"content-type")
    return types[0].decode("latin-1").partition(";")[0].strip().lower() if len(types) == 1 else ""


def is_upload(scope: Scope) -> bool:
    """Whether a request uploads an adapter."""
    return (scope["method"], scope["path"]) == UPLOAD and media_type(scope) in (MULTIPART, *WEIGHTS_TYPES)


def is_json(kind: str) -> bool:
    """Whether a media type (lower case, without parameters) is JSON."""
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
