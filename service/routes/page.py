"""`/` and `/page/…`: the page, static files that hold no data; what it shows comes from the API with the visitor's key.

The files lie in `service/page`, as they are sent: nothing is built. They are read once.
"""

import gzip
import hashlib
import re
from base64 import b64encode
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from service.errors import ApiError, error_response

FOLDER = Path(__file__).resolve().parents[1] / "page"
INDEX = "index.html"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript"}
"""Of the files that are sent; others, such as licences, are plain text."""
IMPORT_MAP = re.compile(r'<script type="importmap">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True, slots=True)
class File:
    """A file as it is sent."""

    plain: bytes
    gzipped: bytes
    tag: str
    media_type: str


@cache
def read_files() -> dict[str, File]:
    """All files of the page, by path in its folder."""
    files = {}
    for path in sorted(path for path in FOLDER.rglob("*") if path.is_file()):
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        media_type = f"{TYPES.get(path.suffix, 'text/plain')}; charset=utf-8"
        packed = gzip.compress(content, mtime=0)
        files[path.relative_to(FOLDER).as_posix()] = File(content, packed, tag, media_type)
    return files


@cache
def make_headers() -> dict[str, str]:
    """What every file is sent with: no other site is asked for anything, and none may frame the page."""
    found = IMPORT_MAP.search(read_files()[INDEX].plain.decode())
    inline = b64encode(hashlib.sha256((found[1] if found else "").encode()).digest()).decode()
    rules = (
        "default-src 'none'",
        f"script-src 'self' 'sha256-{inline}'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "form-action 'none'",
    )
    return {
        "content-security-policy": "; ".join(rules),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
        "cache-control": "no-cache",  # asked again each time, answered 304 while it is the same
        "vary": "accept-encoding",
    }


async def show_file(request: Request) -> Response:
    """Send a file of the page, compressed where the client takes it, or 304 to one who has it."""
    name = request.path_params.get("name", INDEX)
    file = read_files().get(name)
    if file is None:
        return error_response(ApiError(404, f"The page has no file {name[:100]!r}; it is at '/'."))
    headers = make_headers() | {"etag": file.tag}
    if file.tag in request.headers.get("if-none-match", "").replace("W/", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(file.gzipped, media_type=file.media_type, headers=headers | {"content-encoding": "gzip"})
    return Response(file.plain, media_type=file.media_type, headers=headers)


ROUTES = (Route("/", show_file), Route("/page/{name:path}", show_file))


async def answer_page(scope: Scope, receive: Receive, send: Send) -> bool:
    """Answer a request for the page, which is there before the engine is; False: the request is for something else."""
    for route in ROUTES:
        match, child = route.matches(scope)
        if match is Match.FULL:
            await route.handle({**scope, **child}, receive, send)
            return True
    return False
