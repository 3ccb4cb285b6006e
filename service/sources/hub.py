"""Adapters on the hub of Hugging Face, or one that speaks its protocol: `hf://OWNER/NAME[@REVISION][/FOLDER]`."""

import re

import httpx
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, but no re-export

from adapters.files import CONFIG, WEIGHTS
from service.sources.credentials import Credentials
from service.sources.locations import AllowList, Location, Place
from service.sources.transfer import Client, RemoteFile

CDN = (".hf.co", ".huggingface.co")
"""Where the hub itself keeps large files, and redirects to."""
CACHE = ("api", "resolve-cache", "models")
"""What the hub puts before a repository's name when it redirects to small files."""
_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r'(?:W/)?"?([0-9a-f]{64})"?')


def hub_endpoint(credentials: Credentials) -> str:
    """The address of the hub, without a final slash."""
    return (credentials.endpoint or constants.ENDPOINT).rstrip("/")


async def find_files(location: Location, credentials: Credentials, client: Client) -> list[RemoteFile]:
    """The files of an adapter at a revision, which is looked up once: both are of one commit."""
    owner, (name, *folder) = location.place.host, location.place.path
    headers = build_hf_headers(token=credentials.token or None, library_name="lora-fusion")
    revision, files = location.revision or "main", []
    for file in (CONFIG, WEIGHTS):
        url = hf_hub_url(
            f"{owner}/{name}",
            file,
            subfolder="/".join(folder) or None,
            revision=revision,
            endpoint=hub_endpoint(credentials),
        )
        async with client.get(url, headers, method="HEAD", leave=False) as head:
            if head.status_code >= 400:
                code = head.headers.get("x-error-code", head.status_code)
                way = "; check the token in FUSION_SOURCE_CREDENTIALS" if head.status_code in (401, 403) else ""
                raise client.reject(f"the hub answered {str(code)[:40]!r} for {file}{way}")
            if _COMMIT.fullmatch(commit := head.headers.get("x-repo-commit", "")):
                url, revision = url.replace(f"/resolve/{revision}/", f"/resolve/{commit}/", 1), commit
            linked = _SHA256.fullmatch(head.headers.get("x-linked-etag", ""))
        files.append(RemoteFile(url, file, headers, linked[1] if linked else "", revision))
    return files


def may_follow(url: httpx.URL, endpoint: str, allowed: AllowList) -> bool:
    """Whether a redirect of the hub leads to an allowed repository, or to where the hub keeps its large files."""
    base = httpx.URL(endpoint)
    if (url.scheme, url.host, url.port) == (base.scheme, base.host, base.port):
        path = tuple(url.path.removeprefix(base.path.rstrip("/")).strip("/").split("/"))
        path = path[len(CACHE) :] if path[: len(CACHE)] == CACHE else path
        return len(path) > 2 and ".." not in path and allowed.allows(Place("hf", path[0], path[1:2]))
    return base.host == "huggingface.co" and url.scheme == "https" and url.host.endswith(CDN)
