"""Where adapters lie: URLs as clients write them, parsed, and the list of what may be fetched."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from service.errors import ApiError
from service.validation import MAX_QUOTED

SCHEMES = ("hf", "s3", "gs", "https", "http", "oci")
WEB = ("https", "http")
SETTING = "FUSION_SOURCES"
MAX_CHARS = 1024
EXAMPLES = (
    "hf://OWNER/NAME@REVISION, s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, https://HOST/FOLDER/, https://HOST/FILE.tar or "
    "oci://HOST/NAME:TAG"
)
PIN = "sha256:"
_SEGMENT = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@-]+")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9a-f:.]+\]")
_REVISION = re.compile(r"[A-Za-z0-9._-]+(:[A-Za-z0-9._-]+)?")
_PORTS = {"https": 443, "http": 80, "oci": 443}


@dataclass(frozen=True, slots=True)
class Place:
    """A scheme, the host (the bucket, the owner on a hub), and the parts of the path; an empty one is open."""

    scheme: str
    host: str = ""
    path: tuple[str, ...] = ()

    def holds(self, other: "Place") -> bool:
        """Whether `other` is this place, or lies in it."""
        hosts = ("", other.host)
        return self.scheme == other.scheme and self.host in hosts and other.path[: len(self.path)] == self.path


@dataclass(frozen=True, slots=True)
class Location:
    """One adapter's place."""

    place: Place
    text: str
    """As it was written, without the pin: it holds no secret, since a user, a password and a query are refused."""
    revision: str = ""
    """A branch, tag or commit of a hub; a tag or digest of a registry."""
    pin: str = ""
    """The digest that the adapter must have, as `GET /v1/adapters/{name}` shows it; or empty."""

    @property
    def is_archive(self) -> bool:
        """Whether it is one .tar, not a folder."""
        return self.text.endswith(".tar")


def is_remote(text: str) -> bool:
    """Whether `text` is a URL, not a folder."""
    return "://" in text


def parse_location(text: str) -> Location:
    """The location that `text` names; `ApiError` 400 for what is none."""
    if len(text) > MAX_CHARS:
        raise _reject(text, f"it has over {MAX_CHARS} characters")
    bare, _, pin = text.partition("#")
    if pin and not re.fullmatch(PIN + "[0-9a-f]{64}", pin):
        raise _reject(text, "what follows '#' pins the adapter's digest: expected '#sha256:' and 64 hexadecimal digits")
    scheme = bare.partition("://")[0]
    revision, plain = "", bare
    if scheme == "hf" and "@" in bare:
        head, _, tail = bare.partition("@")
        revision, slash, inner = tail.partition("/")
        plain = head + slash + inner
    elif scheme == "oci":
        folder, slash, name = bare.rpartition("/")
        cut = re.search("[:@]", name)
        revision = name[cut.end() :] if cut else "latest"
        plain = folder + slash + (name[: cut.start()] if cut else name)
    if (revision or "@" in bare.rpartition("/")[2]) and scheme in ("hf", "oci") and not _REVISION.fullmatch(revision):
        raise _reject(text, f"{revision[:MAX_QUOTED]!r} is not a revision, tag or digest")
    place = parse_place(plain)
    if not place.host or (not place.path and (scheme not in WEB or not bare.endswith("/"))):
        raise _reject(text, "it names no adapter: expected " + EXAMPLES)
    return Location(place, bare, revision, pin.removeprefix(PIN))


def parse_place(text: str) -> Place:
    """The place that `text`, also one of the list, names; `ApiError` 400 for what is none."""
    if not text.isascii() or not text.isprintable() or " " in text:  # some of which urlsplit leaves out
        raise _reject(text, "it has characters that no URL has")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise _reject(text, "it is no URL") from None
    if parts.scheme not in SCHEMES or "://" not in text:
        raise _reject(text, f"expected one of {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
    if parts.query or parts.fragment or "?" in text or "@" in parts.netloc:
        raise _reject(text, "it has a user, password or query: these go into the file FUSION_SOURCE_CREDENTIALS")
    path = parts.path.strip("/").split("/") if parts.path.strip("/") else []
    for segment in path:
        if not _SEGMENT.fullmatch(segment) or segment in (".", ".."):
            raise _reject(text, f"{segment[:MAX_QUOTED]!r} cannot be a part of its path")
    return Place(parts.scheme, _read_host(parts, port, text), tuple(path))


def _read_host(parts: SplitResult, port: int | None, text: str) -> str:
    host = parts.netloc.rpartition(":")[0] if port is not None else parts.netloc.removesuffix(":")
    if not host and not parts.path.strip("/"):
        return ""  # all of a scheme
    if not _HOST.fullmatch(host) or (port is not None and parts.scheme not in _PORTS):
        raise _reject(text, f"{parts.netloc[:MAX_QUOTED]!r} is not a host name")
    if parts.scheme != "hf":  # names on a hub differ by case
        host = host.lower()
    return host if port in (None, _PORTS.get(parts.scheme)) else f"{host}:{port}"


def _reject(text: str, fault: str) -> ApiError:
    return ApiError(400, f"The source {text[:MAX_QUOTED]!r} cannot be read: {fault}.", param="source")


class AllowList:
    """The places that adapters may come from; without any, none may."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.places = tuple(map(parse_place, texts))

    def allows(self, place: Place) -> bool:
        """Whether `place` lies in one of the list."""
        return any(allowed.holds(place) for allowed in self.places)

    def check(self, location: Location) -> None:
        """Raise `ApiError` 403 for a location that is not in the list."""
        if not self.allows(location.place):
            message = f"The source {location.text[:MAX_QUOTED]!r} is not in {SETTING}; the operator can add it there."
            raise ApiError(403, message, param="source")
