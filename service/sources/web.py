"""Adapters on web servers: a folder, or a .tar of one."""

import base64

from adapters.files import CONFIG, WEIGHTS
from service.sources.credentials import Credentials
from service.sources.locations import Location
from service.sources.transfer import Client, RemoteFile

ARCHIVE = "adapter.tar"
"""What an archive is called here, whatever its name is there."""


def authorization(credentials: Credentials) -> dict[str, str]:
    """The header that shows who asks; empty without credentials."""
    if credentials.token:
        return {"authorization": f"Bearer {credentials.token}"}
    if credentials.username:
        pair = f"{credentials.username}:{credentials.password}".encode()
        return {"authorization": f"Basic {base64.b64encode(pair).decode()}"}
    return {}


def list_names(location: Location) -> tuple[str, ...]:
    """What is fetched from below the location; the archive itself has the empty name."""
    return ("",) if location.is_archive else (CONFIG, WEIGHTS)


async def find_files(location: Location, credentials: Credentials, client: Client) -> list[RemoteFile]:
    """The files of an adapter at an `https://` or `http://` location; nothing is asked for yet."""
    headers, text = authorization(credentials), location.text.rstrip("/")
    return [RemoteFile(f"{text}/{name}" if name else text, name or ARCHIVE, headers) for name in list_names(location)]
