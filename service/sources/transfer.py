"""The one HTTP client of all sources: redirects stay in the list, bodies in their bounds, and pace has a minimum."""

import asyncio
import hashlib
import logging
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

import httpx

from service.errors import ApiError
from service.sources.addresses import CheckedTransport, Network
from service.validation import MAX_QUOTED

MAX_REDIRECTS = 5
MIN_BYTES = 2**16
"""What must arrive within every FUSION_SOURCE_TIMEOUT_S, until the end."""
CHUNK_BYTES = 2**18
MAX_ANSWER_BYTES = 2**22
"""Of what is read into memory: a manifest or a token."""
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""What a server answers that may answer otherwise later."""
REDIRECTS = (301, 302, 303, 307, 308)
for name in ("httpx", "httpcore"):
    logging.getLogger(name).setLevel(logging.WARNING)  # their lines show whole URLs, with signatures
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


class TransientError(Exception):
    """What may go away by itself: a connection that fails or stalls, a server that is busy."""


@dataclass(slots=True)
class Progress:
    """How far a fetch is."""

    bytes: int = 0
    total: int = 0
    """Bytes there will be, as far as is known; 0 before that."""
    kept: int = 0
    """Of `bytes`, what an earlier attempt had fetched."""
    started: float = field(default_factory=time.monotonic)
    """When this attempt began."""

    def restart(self) -> None:
        """Begin another attempt."""
        self.bytes = self.total = self.kept = 0
        self.started = time.monotonic()

    @property
    def speed(self) -> float:
        """Bytes in a second, since this attempt began."""
        return (self.bytes - self.kept) / max(1e-3, time.monotonic() - self.started)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of an adapter, and where it is."""

    url: str = field(repr=False)
    """With a signature, perhaps: never shown."""
    name: str
    """What it is called in the folder."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    sha256: str = ""
    """Of the content, if known before."""
    version: str = ""
    """What the whole folder is a version of, if the source has such; what is of another one is not kept."""
    max_bytes: int = 2**63


@dataclass(frozen=True, slots=True)
class Client:
    """Asks the hosts of one source. Every error names the source, a host and a status, and no secret."""

    source: str
    http: httpx.AsyncClient
    timeout_s: float
    may_follow: Callable[[httpx.URL], bool]
    """Whether a redirect to this URL is in the list."""

    @asynccontextmanager
    async def get(
        self, url: str, headers: Mapping[str, str], *, method: str = "GET", leave: bool = True
    ) -> AsyncIterator[httpx.Response]:
        """The answer to a request, its body not read yet; any status but those of `BUSY`. It is that after all
        redirects, or after those that do not `leave` the host.

        `TransientError` for what may pass, `ApiError` 403 for a host that is not allowed.
        """
        target, sent = httpx.URL(url), dict(headers)
        for _ in range(MAX_REDIRECTS + 1):
            request = self.http.build_request(method, target, headers={**sent, "accept-encoding": "identity"})
            response = await self._send(request)
            try:
                is_redirect = response.status_code in REDIRECTS and "location" in response.headers
                onward = self._join(target, response.headers["location"]) if is_redirect else target
                leaves = (onward.scheme, onward.host, onward.port) != (target.scheme, target.host, target.port)
                if not is_redirect or (leaves and not leave):
                    yield self._check(response)
                    return
                self._check_redirect(target, onward)
            finally:
                await response.aclose()
            if leaves:
                sent = {name: value for name, value in sent.items() if name != "authorization"}
            target = onward
        raise self.reject(f"{target.host} redirects more than {MAX_REDIRECTS} times")

    async def read(self, url: str, headers: Mapping[str, str], *, method: str = "GET") -> tuple[httpx.Response, bytes]:
        """An answer and its short body."""
        content = bytearray()
        async with self.get(url, headers, method=method) as response:
            async for chunk in self._receive(response):
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise self.reject(f"an answer of {response.url.host} has over {MAX_ANSWER_BYTES} bytes", 502)
        return response, bytes(content)

    async def download(self, file: RemoteFile, folder: Path, progress: Progress) -> None:
        """Write `file` into `folder`, on from what an earlier attempt left there if it is still the same file.

        `ApiError` when it is missing, larger than it may be, or not what it should be; `TransientError` to try again.
        """
        done, part, mark = folder / file.name, folder / f"{file.name}.part", folder / f"{file.name}.mark"
        if done.exists():
            progress.bytes += done.stat().st_size
            progress.kept += done.stat().st_size
            return
        start, version = (part.stat().st_size, mark.read_text()) if part.exists() and mark.exists() else (0, "")
        known = {"range": f"bytes={start}-", "if-range": version} if start else {}
        before = progress.bytes
        async with self.get(file.url, {**file.headers, **known}) as response:
            start = self._find_start(response, file, start)
            self._check_size(response, file, start, progress, before)
            mark.write_text(_read_version(response))
            with part.open("r+b" if start else "wb", CHUNK_BYTES) as out:
                out.truncate(start)
                digest = _hash_start(out, file.sha256, start)
                progress.bytes = before + start
                progress.kept += start
                async for chunk in self._receive(response):
                    progress.bytes += len(chunk)
                    if progress.bytes - before > file.max_bytes:
                        raise self._too_large(file)
                    out.write(chunk)
                    if digest is not None:
                        digest.update(chunk)
        if digest is not None and digest.hexdigest() != file.sha256:
            part.unlink()
            raise self.reject(f"{file.name} is not what its digest says", 502)
        os.replace(part, done)
        mark.unlink()

    def reject(self, fault: str, status: int = 400) -> ApiError:
        """The error that ends a fetch."""
        return ApiError(status, f"The source {self.source[:MAX_QUOTED]!r} cannot be fetched: {fault}.", param="source")

    async def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self.http.send(request, stream=True)
        except TimeoutError:
            raise TransientError(f"{request.url.host} answered nothing within {self.timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise TransientError(f"{request.url.host}: {_describe(error)}") from error

    def _check(self, response: httpx.Response) -> httpx.Response:
        if response.status_code in BUSY:
            raise TransientError(f"{response.url.host} answered {response.status_code}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise self.reject(f"{response.url.host} sends it compressed; it must be sent as it is")
        return response

    def _join(self, target: httpx.URL, location: str) -> httpx.URL:
        try:
            return target.join(location)
        except (httpx.InvalidURL, ValueError):
            raise self.reject(f"{target.host} redirects to what is no URL") from None

    def _check_redirect(self, target: httpx.URL, onward: httpx.URL) -> None:
        if not self.may_follow(onward):
            message = f"{target.host} redirects to {onward.scheme}://{onward.host}, which is not in FUSION_SOURCES"
            raise self.reject(message, 403)

    def _find_start(self, response: httpx.Response, file: RemoteFile, start: int) -> int:
        """Where the body of `response` begins in the file."""
        if response.status_code == 200:
            return 0
        if response.status_code == 206 and (found := _RANGE.match(response.headers.get("content-range", ""))):
            if int(found[1]) == start:
                return start
        elif response.status_code == 416:  # the file is shorter now, or was whole already
            raise TransientError(f"{response.url.host} has no more of {file.name}")
        ways = {401: "; check FUSION_SOURCE_CREDENTIALS", 403: "; check FUSION_SOURCE_CREDENTIALS"}
        ways[404] = f"; it must hold an {file.name}"
        status = response.status_code
        raise self.reject(f"{response.url.host} answered {status} for {file.name}{ways.get(status, '')}")

    def _check_size(
        self, response: httpx.Response, file: RemoteFile, start: int, progress: Progress, before: int
    ) -> None:
        length = response.headers.get("content-length", "")
        if length.isascii() and length.isdecimal():
            if start + int(length) > file.max_bytes:
                raise self._too_large(file)
            progress.total = before + start + int(length)

    def _too_large(self, file: RemoteFile) -> ApiError:
        return self.reject(f"{file.name} is larger than {file.max_bytes} bytes (FUSION_MAX_UPLOAD_BYTES)")

    async def _receive(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The parts of a body; `TransientError` when MIN_BYTES do not arrive in time or the connection ends."""
        clock, arrived = asyncio.get_running_loop().time, 0
        parts = response.aiter_raw()
        deadline = clock() + self.timeout_s
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(parts, b"")
                if not chunk:
                    return
                yield chunk
                arrived += len(chunk)
                if arrived >= MIN_BYTES:
                    deadline, arrived = clock() + self.timeout_s, 0
        except TimeoutError:
            message = f"{response.url.host} sent fewer than {MIN_BYTES} bytes within {self.timeout_s:g} s"
            raise TransientError(message) from None
        except httpx.HTTPError as error:
            raise TransientError(f"{response.url.host}: {_describe(error)}") from error


@asynccontextmanager
async def open_client(
    source: str, networks: Sequence[Network], timeout_s: float, may_follow: Callable[[httpx.URL], bool]
) -> AsyncIterator[Client]:
    """A client for one fetch of `source`. Proxies of the environment are not used: they would look names up."""
    transport = CheckedTransport(networks, _tls_context())
    async with httpx.AsyncClient(transport=transport, timeout=timeout_s, trust_env=False) as http:
        yield Client(source, http, timeout_s, may_follow)


@cache
def _tls_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # certificates of SSL_CERT_FILE, if set


def _read_version(response: httpx.Response) -> str:
    """What tells a file from a later one of that name; weak tags do not."""
    tag: str = response.headers.get("etag", "")
    return tag if tag.startswith('"') else response.headers.get("last-modified", "")


def _hash_start(file: IO[bytes], sha256: str, start: int) -> Any:
    """A hash that has seen the first `start` bytes of `file`, which is left at that place; none without `sha256`."""
    digest = hashlib.sha256() if sha256 else None
    if digest is not None:
        file.seek(0)
        for _ in range(0, start, CHUNK_BYTES):
            digest.update(file.read(CHUNK_BYTES))
    file.seek(start)
    return digest


def _describe(error: httpx.HTTPError) -> str:
    """An error without a URL, which may hold a signature."""
    kinds: dict[type[httpx.HTTPError], str] = {
        httpx.ConnectError: "no connection",
        httpx.TimeoutException: "no answer in time",
        httpx.RemoteProtocolError: "the connection ended early",
    }
    return next((text for kind, text in kinds.items() if isinstance(error, kind)), type(error).__name__)
