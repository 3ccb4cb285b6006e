"""Servers on loopback that adapters are fetched from: files, a hub, a registry, and one that does its worst."""

import base64
import hashlib
import io
import json
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from adapters.files import CONFIG, WEIGHTS
from service.sources.oci import MANIFESTS, TITLE


class Handler(BaseHTTPRequestHandler):
    """Asks the host's `answer`; what it raises when the client goes is nobody's concern."""

    protocol_version = "HTTP/1.1"
    host: "Host"

    def do_GET(self) -> None:
        self.host.asked.append((self.command, self.path, dict(self.headers.items())))
        with suppress(ConnectionError):
            self.host.answer(self)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server asks for

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, content: bytes = b"", **headers: str) -> None:
        """A whole answer; with a range, the part that was asked for if it is still the same content."""
        tag, asked = headers.get("etag"), re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        total = len(content)
        if status == 200 and asked and self.headers.get("if-range") == tag:
            status, content = 206, content[int(asked[1]) :]
            headers["content_range"] = f"bytes {asked[1]}-{total - 1}/{total}"
        self.send_response(status)
        for name, value in {"content_length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@dataclass
class Host:
    """A running server and what it was asked: method, path, headers."""

    url: str
    answer: Callable[[Handler], None]
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.url.removeprefix("http://")

    def paths(self) -> list[str]:
        return [path for _, path, _ in self.asked]


@contextmanager
def serve(answer: Callable[[Handler], None]) -> Iterator[Host]:
    """A server on loopback for the block."""
    kind = type("Own", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    kind.host = host = Host(f"http://127.0.0.1:{server.server_address[1]}", answer)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield host
    finally:
        server.shutdown()
        server.server_close()


def start_body(handler: Handler, **headers: str) -> None:
    """The head of an answer whose body follows in the test's own way."""
    handler.send_response(200)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def tag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def pack(contents: dict[str, bytes]) -> bytes:
    """A .tar of these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def share(contents: dict[str, bytes]) -> Callable[[Handler], None]:
    """Files at paths."""

    def answer(handler: Handler) -> None:
        content = contents.get(handler.path)
        if content is None:
            handler.send(404)
        else:
            handler.send(200, content, etag=tag(content))

    return answer


COMMIT = "c0ffee" + "0" * 34


def hub(repository: str, contents: dict[str, bytes], cdn: str, *, token: str = "") -> Callable[[Handler], None]:
    """The hub's protocol for one repository, large files redirected to `cdn`, as huggingface_hub asks for it."""

    def answer(handler: Handler) -> None:
        path = re.fullmatch(rf"/{repository}/resolve/(main|{COMMIT})/(?P<file>[\w./]+)", handler.path)
        if token and handler.headers.get("authorization") != f"Bearer {token}":
            handler.send(401, x_error_code="GatedRepo")
        elif path is None:
            handler.send(404, x_error_code="RepoNotFound")
        elif path["file"] not in contents:
            handler.send(404, x_error_code="EntryNotFound", x_repo_commit=COMMIT)
        elif path["file"] == WEIGHTS:
            digest = hashlib.sha256(contents[WEIGHTS]).hexdigest()
            size: dict[str, Any] = {"x_linked_size": str(len(contents[WEIGHTS])), "x_linked_etag": f'"{digest}"'}
            handler.send(302, location=f"{cdn}/{digest}", x_repo_commit=COMMIT, etag=f'"{digest}"', **size)
        else:
            content = contents[path["file"]]
            handler.send(200, content, x_repo_commit=COMMIT, etag=tag(content))

    return answer


def registry(name: str, contents: dict[str, bytes], user: str, password: str) -> tuple[Callable[[Handler], None], str]:
    """OCI Distribution 1.1 for pulling one artifact `name:v1`, with its dance for tokens; and the manifest's digest."""

    def digest(content: bytes) -> str:
        return "sha256:" + hashlib.sha256(content).hexdigest()

    layers = [
        {
            "mediaType": "application/octet-stream",
            "digest": digest(content),
            "size": len(content),
            "annotations": {TITLE: title},
        }
        for title, content in contents.items()
    ]
    config = b"{}"
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest(config), "size": 2}
    manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFESTS[0], "config": empty, "layers": layers}).encode()
    blobs = {digest(content): content for content in (*contents.values(), config)}

    def answer(handler: Handler) -> None:
        scope = f"repository:{name}:pull"
        if handler.path.startswith("/token?"):
            basic = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
            good = handler.headers.get("authorization") == basic and "service=registry" in handler.path
            handler.send(200, b'{"token": "good"}') if good else handler.send(401)
        elif handler.headers.get("authorization") != "Bearer good":
            realm = f'Bearer realm="{handler.host.url}/token",service="registry",scope="{scope}"'
            handler.send(401, www_authenticate=realm)
        elif handler.path in (f"/v2/{name}/manifests/v1", f"/v2/{name}/manifests/{digest(manifest)}"):
            kind = MANIFESTS[0] if MANIFESTS[0] in handler.headers.get("accept", "") else "text/plain"
            handler.send(200, manifest, content_type=kind, docker_content_digest=digest(manifest))
        elif handler.path.removeprefix(f"/v2/{name}/blobs/") in blobs:
            handler.send(200, blobs[handler.path.removeprefix(f"/v2/{name}/blobs/")])
        else:
            handler.send(404)

    return answer, digest(manifest)
