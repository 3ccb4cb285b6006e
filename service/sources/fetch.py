"""One fetch from begin to end: which files there are, attempts, and the folder that they fill."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import httpx

from adapters import AdapterError, LoraAdapter, load
from adapters.files import CONFIG, unpack_adapter
from service.data_folder import scratch_folder
from service.errors import ApiError
from service.settings import Settings, SettingsError
from service.sources import hub, objects, oci, web
from service.sources.addresses import Network, read_networks
from service.sources.credentials import Credentials, find_credentials, read_credentials
from service.sources.locations import SETTING, AllowList, Location, Place
from service.sources.transfer import Client, Progress, RemoteFile, TransientError, open_client

ATTEMPTS = 6
MAX_PAUSE_S = 30.0
MAX_CONFIG_BYTES = 2**20
VERSION = "version"
"""A file in the folder: what its content is a version of."""
Finder = Callable[[Location, Credentials, Client], Awaitable[list[RemoteFile]]]
FINDERS: Mapping[str, Finder] = {
    "hf": hub.find_files,
    "s3": objects.find_files,
    "gs": objects.find_files,
    "oci": oci.find_files,
    "https": web.find_files,
    "http": web.find_files,
}


@dataclass(frozen=True, slots=True)
class Sources:
    """Fetches adapters from where the settings allow."""

    allowed: AllowList
    networks: tuple[Network, ...]
    credentials_file: str
    timeout_s: float
    max_bytes: int
    pause_s: float = 1.0
    """Before the second attempt; twice as long before each further one."""

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """As the settings say; `SettingsError` for those that cannot be read."""
        try:
            allowed = AllowList(settings.sources)
        except ApiError as error:
            raise SettingsError(f"{SETTING}: {error}") from None
        try:
            networks = read_networks(settings.source_networks)
        except ValueError as error:
            raise SettingsError(f"FUSION_SOURCE_NETWORKS: {error}; expected networks as 10.0.0.0/8") from None
        read_credentials(settings.source_credentials)  # again for each fetch, since they change
        return cls(allowed, networks, settings.source_credentials, settings.source_timeout_s, settings.max_upload_bytes)

    async def fetch(self, location: Location, folder: Path, progress: Progress) -> None:
        """Fill `folder` with the adapter at `location`, on from what is there already.

        `ApiError` with the reason when that is refused, or does not succeed in `ATTEMPTS`; OSError of the disk.
        """
        self.allowed.check(location)
        credentials = find_credentials(read_credentials(self.credentials_file), location.place)
        may_follow = partial(self._may_follow, location, credentials)
        async with open_client(location.text, self.networks, self.timeout_s, may_follow) as client:
            for attempt in range(1, ATTEMPTS + 1):
                progress.restart()
                try:
                    await self._attempt(location, credentials, client, folder, progress)
                    return
                except TransientError as error:
                    if attempt == ATTEMPTS:
                        raise client.reject(f"{error}, at the last of {ATTEMPTS} attempts", 502) from error
                await asyncio.sleep(min(MAX_PAUSE_S, self.pause_s * 2 ** (attempt - 1)))

    async def _attempt(
        self, location: Location, credentials: Credentials, client: Client, folder: Path, progress: Progress
    ) -> None:
        files = await FINDERS[location.place.scheme](location, credentials, client)
        version, known = " ".join(file.version for file in files), folder / VERSION
        if not known.exists() or known.read_text() != version:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            known.write_text(version)
        for file in files:
            limit = min(MAX_CONFIG_BYTES, self.max_bytes) if file.name == CONFIG else self.max_bytes
            await client.download(replace(file, max_bytes=limit), folder, progress)

    def _may_follow(self, location: Location, credentials: Credentials, url: httpx.URL) -> bool:
        path = url.path.strip("/").split("/")
        raw = url.raw_path.partition(b"?")[0].lower()
        if url.userinfo or {"", ".", ".."} & set(path) or any(code in raw for code in (b"%2f", b"%5c", b"\\")):
            return False
        if location.place.scheme == "hf" and hub.may_follow(url, hub.hub_endpoint(credentials), self.allowed):
            return True
        host = url.netloc.decode()
        return self.allowed.allows(Place(url.scheme, host, tuple(path)))


def read_fetched(folder: Path, pin: str, data: Path) -> LoraAdapter:
    """The adapter that was fetched into `folder`, an archive unpacked in `data`; AdapterError when it is none, or its
    digest is not `pin`.
    """
    if (folder / web.ARCHIVE).exists():
        with scratch_folder(data, "upload") as unpacked, (folder / web.ARCHIVE).open("rb") as file:
            unpack_adapter(file, unpacked)
            adapter = load(unpacked)
    else:
        adapter = load(folder)
    if pin and adapter.digest != pin:
        raise AdapterError("pin", f"its digest is {adapter.digest}, not the one pinned by '#sha256:'")
    return adapter
