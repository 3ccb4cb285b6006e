"""A bucket (S3) as the place that replicas share.

An entry is `KEY/SHA256` for each of its files and `KEY/manifest`, which names them. The manifest is written last, and
only where there is none, so whoever reads it finds one replica's entry, whole; what arrives is compared with it.
"""

import hashlib
import json
import logging
import posixpath
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from adapters import Entry
from service.settings import SettingsError
from service.shared_store import CLOCK, DamagedEntryError, other_registry
from service.sources.credentials import SETTING, Credentials, find_credentials, read_credentials
from service.sources.locations import parse_place
from service.sources.objects import open_s3

PART_BYTES = 2**23
"""Of a file, in one request, which ends within the limit of time."""
AT_ONCE = 2
"""Parts of a file that are sent at once."""
RETRIES = 2
RETRY_S = 10.0
"""How long a bucket that did not answer is left alone."""
MAX_MANIFEST_BYTES = 2**16
MAX_FILES = 64
MANIFEST, USED, OWNER = "manifest", "used", "registry"
_DIGEST = re.compile("[0-9a-f]{64}")
log = logging.getLogger("fusion")


class BucketError(OSError):
    """The bucket failed; says where and how, without what a server has said, which may hold a secret."""

    def __init__(self, place: str, fault: str) -> None:
        super().__init__(f"{place}: {fault}")


@dataclass(frozen=True, slots=True)
class _File:
    sha256: str
    bytes: int


class Bucket:
    """A folder of a bucket, with the credentials that its file has now."""

    def __init__(self, place: str, *, credentials_file: str, timeout_s: float) -> None:
        """`place` is `s3://BUCKET/FOLDER`; no request takes over `timeout_s` (seconds)."""
        self.place, self._where = place, parse_place(place)
        self._credentials_file, self._timeout_s = credentials_file, timeout_s
        self._known: tuple[Credentials, S3Store] | None = None
        self._fault = ""
        """What was wrong when it was asked last."""
        self._retry_at = 0.0

    @contextmanager
    def ask(self) -> Iterator[S3Store]:
        """obstore's store for the block; `BucketError` when the bucket fails. After that it is asked by one caller at a
        time, every RETRY_S, until it answers; all others get the error at once.

        FileNotFoundError and AlreadyExistsError pass through.
        """
        if self._fault:
            if time.monotonic() < self._retry_at:
                raise BucketError(self.place, self._fault)
            self._retry_at = time.monotonic() + self._timeout_s
        try:
            yield self._open()
        except (UnauthenticatedError, PermissionDeniedError) as error:
            raise BucketError(self.place, f"it refuses the credentials; check {SETTING}") from error
        except AlreadyExistsError:
            raise
        except (BaseError, SettingsError) as error:
            self._fault = f"it does not answer as a bucket does ({type(error).__name__})"
            self._retry_at = time.monotonic() + RETRY_S
            raise BucketError(self.place, self._fault) from error
        self._fault = ""

    def _open(self) -> S3Store:
        credentials = find_credentials(read_credentials(self._credentials_file), self._where)
        if self._known is None or self._known[0] != credentials:
            limit = timedelta(seconds=self._timeout_s)
            store = open_s3(
                self._where.host,
                credentials,
                prefix="/".join(self._where.path) or None,
                client_options={"timeout": limit, "connect_timeout": min(limit, timedelta(seconds=5))},
                retry_config={"max_retries": RETRIES, "retry_timeout": limit},
            )
            self._known = credentials, store
        return self._known[1]

    def claim(self, identity: str) -> None:
        """Make it the bucket that replicas of the registry `identity` share; RuntimeError when it is another's, fails,
        or does not keep what is there from being written over.
        """
        message = f"FUSION_STORE={self.place!r} cannot be used"
        try:
            with self.ask() as store:
                for _ in range(2):
                    try:
                        obstore.put(store, OWNER, identity.encode(), mode="create")
                    except AlreadyExistsError:
                        break
                else:
                    raise RuntimeError(f"{message}: it writes over what is there (it must know If-None-Match)")
                found = bytes(obstore.get(store, OWNER).bytes())[:64].decode(errors="replace")
        except FileNotFoundError as error:
            raise RuntimeError(f"{message}: the bucket does not exist; create it or correct its name") from error
        except BucketError as error:
            raise RuntimeError(f"{message}: {error}") from error
        if found != identity:
            raise other_registry(self.place, found)


class BucketRemote:
    """Entries in a folder of a bucket."""

    def __init__(self, bucket: Bucket, folder: str, *, budget_bytes: int) -> None:
        self._bucket, self._folder, self._budget_bytes = bucket, folder, budget_bytes

    def has(self, key: str) -> bool:
        """Whether the entry is there; marks it as used now."""
        with self._bucket.ask() as store:
            try:
                obstore.head(store, self._path(key, MANIFEST))
            except FileNotFoundError:
                return False
            obstore.put(store, self._path(key, USED), b"")
        return True

    def fetch(self, key: str, folder: Path) -> bool:
        """Copy the entry into `folder`, every file compared with its digest and size; False when it is not there."""
        try:
            with self._bucket.ask() as store:
                try:
                    files = self._read_manifest(store, key)
                except FileNotFoundError:
                    return False
                for name, file in files.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    self._download(store, key, file, folder / name)
                obstore.put(store, self._path(key, USED), b"")
        except FileNotFoundError as error:
            raise DamagedEntryError("a file is gone") from error
        return True

    def publish(self, key: str, folder: Path) -> None:
        """Send all files, then their manifest, unless there is one."""
        files = {}
        with self._bucket.ask() as store:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                with path.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                obstore.put(store, self._path(key, digest), path, chunk_size=PART_BYTES, max_concurrency=AT_ONCE)
                files[path.relative_to(folder).as_posix()] = {"sha256": digest, "bytes": path.stat().st_size}
            try:
                obstore.put(store, self._path(key, MANIFEST), json.dumps(files).encode(), mode="create")
            except AlreadyExistsError:
                log.debug("another replica was first with %s", key[:12])

    def remove(self, key: str) -> None:
        """Remove the entry, its manifest first: who has not read that finds none."""
        with self._bucket.ask() as store:
            obstore.delete(store, self._path(key, MANIFEST))
            for page in obstore.list(store, self._path(key)):
                obstore.delete(store, [each["path"] for each in page])

    def entries(self) -> list[Entry]:
        """All entries, also those that are not whole, least recently used first."""
        sizes: defaultdict[str, int] = defaultdict(int)
        used: defaultdict[str, float] = defaultdict(float)
        with self._bucket.ask() as store:
            for page in obstore.list(store, self._folder):
                for each in page:
                    _, _, rest = each["path"].rpartition(f"{self._folder}/")
                    key, slash, _ = rest.partition("/")
                    if slash:
                        sizes[key] += each["size"]
                        used[key] = max(used[key], each["last_modified"].timestamp())
        return sorted(
            (Entry(key, sizes[key], used[key]) for key in sizes), key=lambda entry: (entry.last_used, entry.key)
        )

    def evict(self) -> None:
        """Remove what is over the budget, least recently used first."""
        entries = self.entries()
        excess = sum(entry.bytes for entry in entries) - self._budget_bytes
        for entry in entries:
            if excess <= 0:
                return
            self.remove(entry.key)
            excess -= entry.bytes

    def now(self) -> float:
        """The bucket's time, of an object that is written now."""
        with self._bucket.ask() as store:
            obstore.put(store, CLOCK, b"")
            return obstore.head(store, CLOCK)["last_modified"].timestamp()

    def _path(self, *parts: str) -> str:
        return posixpath.join(self._folder, *parts)

    def _read_manifest(self, store: S3Store, key: str) -> dict[str, _File]:
        """The entry's files by their path in it; `DamagedEntryError` for what `publish` does not write."""
        answer = obstore.get(store, self._path(key, MANIFEST))
        if answer.meta["size"] > MAX_MANIFEST_BYTES:
            raise DamagedEntryError(f"its manifest has over {MAX_MANIFEST_BYTES} bytes")
        try:
            files = {name: _File(**file) for name, file in json.loads(bytes(answer.bytes())).items()}
            is_good = 0 < len(files) <= MAX_FILES and all(_is_plain(name) and _is_file(f) for name, f in files.items())
        except (ValueError, TypeError, AttributeError):
            is_good = False
        if not is_good:
            raise DamagedEntryError("its manifest cannot be read")
        if (total := sum(file.bytes for file in files.values())) > self._budget_bytes:
            raise DamagedEntryError(f"it has {total} bytes, over FUSION_STORE_BYTES")
        return files

    def _download(self, store: S3Store, key: str, file: _File, target: Path) -> None:
        digest = hashlib.sha256()
        with target.open("xb") as out:
            for start in range(0, file.bytes, PART_BYTES):
                end = min(start + PART_BYTES, file.bytes)
                part = obstore.get_range(store, self._path(key, file.sha256), start=start, end=end)
                digest.update(part)
                out.write(part)
        if digest.hexdigest() != file.sha256:
            raise DamagedEntryError(f"{target.name} is not what its digest says")


def _is_plain(name: str) -> bool:
    """Whether `name` is a path that stays in its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _is_file(file: _File) -> bool:
    return (
        isinstance(file.sha256, str)
        and bool(_DIGEST.fullmatch(file.sha256))
        and type(file.bytes) is int
        and file.bytes >= 0
    )
