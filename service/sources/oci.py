"""Adapters in registries of containers: `oci://HOST/NAME:TAG`, or `@sha256:…`.

The protocol is OCI Distribution 1.1: a manifest, whose layers are the adapter's two files, titled as ORAS does
(`oras push HOST/NAME:TAG adapter_config.json adapter_model.safetensors`), or one .tar.
"""

import hashlib
import json
import re
from typing import Any

import httpx

from adapters.files import CONFIG, WEIGHTS
from service.sources.credentials import Credentials
from service.sources.locations import Location
from service.sources.transfer import Client, RemoteFile
from service.sources.web import ARCHIVE, authorization

MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
TITLE = "org.opencontainers.image.title"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


async def find_files(location: Location, credentials: Credentials, client: Client) -> list[RemoteFile]:
    """The layers of the manifest that are an adapter's files."""
    base = (credentials.endpoint or f"https://{location.place.host}").rstrip("/")
    place = f"{base}/v2/{'/'.join(location.place.path)}"
    headers = {"accept": ", ".join(MANIFESTS), **authorization(credentials)}
    url = f"{place}/manifests/{location.revision}"
    answer, content = await client.read(url, headers)
    if answer.status_code == 401:
        headers |= await _log_in(answer, base, credentials, client)
        answer, content = await client.read(url, headers)
    if answer.status_code != 200:
        way = "; check FUSION_SOURCE_CREDENTIALS" if answer.status_code in (401, 403) else ""
        raise client.reject(f"the registry answered {answer.status_code} for its manifest{way}")
    if location.revision.startswith("sha256:") and _digest(content) != location.revision:
        raise client.reject("its manifest is not what its digest says", 502)
    layers = _read_layers(content, client)
    passed = {name: value for name, value in headers.items() if name == "authorization"}
    return [
        RemoteFile(f"{place}/blobs/{digest}", name, passed, digest.removeprefix("sha256:"), _digest(content))
        for name, digest in layers.items()
    ]


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _read_layers(content: bytes, client: Client) -> dict[str, str]:
    """Digests of the layers, by the name of the file each is."""
    try:
        layers: list[dict[str, Any]] = json.loads(content)["layers"]
        digests = {str((layer.get("annotations") or {}).get(TITLE, "")): str(layer["digest"]) for layer in layers}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise client.reject("its manifest lists no layers; give that of one artifact, not of an index") from None
    if {CONFIG, WEIGHTS} <= digests.keys():
        found = {name: digests[name] for name in (CONFIG, WEIGHTS)}
    elif len(layers) == 1:
        found = {ARCHIVE: str(layers[0]["digest"])}
    else:
        raise client.reject(f"it has no layers titled {CONFIG} and {WEIGHTS}, nor a single .tar")
    if not all(map(_DIGEST.fullmatch, found.values())):
        raise client.reject("a layer has no digest of sha256")
    return found


async def _log_in(answer: httpx.Response, base: str, credentials: Credentials, client: Client) -> dict[str, str]:
    """The header with the token that the registry's challenge asks for."""
    kind, _, rest = answer.headers.get("www-authenticate", "").partition(" ")
    challenge = dict(_CHALLENGE.findall(rest))
    if kind.lower() != "bearer" or "realm" not in challenge:
        raise client.reject("the registry answered 401; check FUSION_SOURCE_CREDENTIALS")
    try:
        realm = httpx.URL(challenge.pop("realm")).copy_merge_params(
            {key: challenge[key] for key in ("service", "scope") if key in challenge}
        )
    except httpx.InvalidURL:
        raise client.reject("the registry's place of tokens is no URL") from None
    own = httpx.URL(base)
    if (realm.scheme, realm.host, realm.port) != (own.scheme, own.host, own.port) and not client.may_follow(realm):
        raise client.reject(f"its tokens come from https://{realm.host}, which is not in FUSION_SOURCES", 403)
    asked, content = await client.read(str(realm), authorization(credentials))
    try:
        given = json.loads(content) if asked.status_code == 200 else {}
        token = given.get("token") or given["access_token"]
    except (ValueError, KeyError, AttributeError, RecursionError):
        raise client.reject("the registry gave no token; check FUSION_SOURCE_CREDENTIALS") from None
    return {"authorization": f"Bearer {token}"}
