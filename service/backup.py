"""Backups: a registry's rows and its adapters' files in one folder, taken while servers run, verified bit by bit.

Stacks and builds are left out: they are made again. So are secrets that are files of the operator's own: the policy,
the receipt key, credentials of sources.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, NullPool, create_engine, inspect, select
from sqlalchemy.engine import URL, make_url

from adapters import AdapterError, Store, load
from adapters.files import CHECKSUMS, is_whole, sync
from service.audit import Actor, Entry, append_entry
from service.backup_rows import PASSING, format_row, insert_rows, keep_bytes, read_rows
from service.migrations import NewerSchemaError, check_known, find_revision, migrate
from service.records import DamageError, now, read_adapter, read_version
from service.remote_stores import UNLIMITED, open_shared_store
from service.settings import Settings
from service.tables import KEYS

FORMAT, FIRST = 1, "0001"
"""Of backups, and of the schema that tables without migrations are brought to."""
MANIFEST, ROWS, ADAPTERS = "backup.json", "registry.jsonl", "adapters"
RESTORER = Actor(role="operator", address="offline")
MAX_TRIES = 3
"""How often a registry is read whose adapters are deleted meanwhile."""
Say = Callable[[str], None]


class BackupError(RuntimeError):
    """A backup, or its restoration, cannot be done; the message says why and what to do."""


def find_url(settings: Settings) -> URL:
    """The registry's URL, with the driver that is installed."""
    url = make_url(settings.registry_url)
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgres", "postgresql") else url


def write_backup(settings: Settings, target: Path, say: Say) -> dict[str, Any]:
    """Fill the new folder `target` with a backup of what the settings name; returns its manifest. BackupError."""
    url = find_url(settings)
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).is_file():
        raise BackupError(f"no registry found at {url.database!r}: set FUSION_DATA or FUSION_DATABASE")
    target.mkdir(parents=True)
    store = open_shared_store(settings, target, only_reads=True) or Store(
        settings.data / ADAPTERS, budget_bytes=UNLIMITED
    )
    for _ in range(MAX_TRIES):
        revision, counts, digests = _dump(url, target / ROWS, say)
        say(f"registry: {sum(counts.values())} rows of {len(counts)} tables")
        missing = [digest for digest in digests if not _copy(store, digest, target / ADAPTERS / digest, say)]
        if not missing:
            break
    else:
        message = f"the files of adapter {missing[0]} are not whole; GET /v1/adapters says which are damaged"
        raise BackupError(f"{message}: register them again, or delete them, and repeat the backup")
    for folder in (target / ADAPTERS).iterdir() if digests else ():
        if folder.name not in digests:  # deleted between two readings
            shutil.rmtree(folder)
    manifest = {
        "format": FORMAT,
        "created": now(),
        "schema": revision,
        "rows": counts,
        "registry_sha256": _hash(target / ROWS),
        "adapters": sorted(digests),
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _dump(url: URL, file: Path, say: Say) -> tuple[str, dict[str, int], set[str]]:
    """Write all rows as they were at one moment; the schema's revision, rows by table, and digests of adapters."""
    engine = create_engine(url, poolclass=NullPool)
    is_sqlite = engine.dialect.name == "sqlite"
    keep_bytes(engine)
    try:
        with engine.connect() as connection, file.open("w") as out:
            if is_sqlite:
                connection.exec_driver_sql("BEGIN")
            else:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            revision, counts, digests = find_revision(connection), dict[str, int](), set[str]()
            for table, row in read_rows(connection):
                counts[table] = counts.get(table, 0) + 1
                digests |= _list_digests(table, row, say)
                if any(isinstance(value, bytes) for value in row.values()):
                    name = next(iter(row.values()))
                    say(f"the row of {name!r} in {table} has bytes for text; it is backed up as it is")
                out.write(format_row(table, row))
            return revision, counts, digests
    finally:
        engine.dispose()


def _list_digests(table: str, row: dict[str, Any], say: Say) -> set[str]:
    """The adapters whose files a row needs: none when it is damaged, for then its digests may be, too."""
    try:
        match table:
            case "adapters" | "nameless_adapters":
                return {read_adapter(**row).digest}
            case "profile_versions":
                return {*read_version(**row).parents.values()}
    except DamageError as error:
        say(f"the row of {row['name']!r} in {table} is damaged: {error}; it is backed up as it is, without files")
    return set()


def _copy(store: Store, digest: str, target: Path, say: Say) -> bool:
    """Copy an adapter's files, unless they are there, and verify them; False when they are not whole."""
    if target.is_dir() and check_adapter(target, digest):
        return True
    shutil.rmtree(target, ignore_errors=True)
    source = store.fetch(digest)
    if source is None:
        return False
    if source != target:
        target.parent.mkdir(exist_ok=True)
        try:
            shutil.copytree(source, target)
        except (FileNotFoundError, shutil.Error):
            if source.exists():
                raise
            return False  # deleted meanwhile
    say(f"adapter {digest[:12]}: {sum(f.stat().st_size for f in target.rglob('*') if f.is_file())} bytes")
    return check_adapter(target, digest)


def check_adapter(folder: Path, digest: str) -> bool:
    """Whether a folder has the adapter of this digest, to the last bit."""
    try:
        summed = not (folder / CHECKSUMS).exists() or is_whole(folder)  # those of early versions have no sums
        return summed and load(folder / "adapter").digest == digest
    except (AdapterError, OSError):
        return False


def read_manifest(source: Path) -> dict[str, Any]:
    """The manifest of a backup whose every file was found to be as it was written; BackupError says which is not."""
    try:
        manifest: dict[str, Any] = json.loads((source / MANIFEST).read_text())
        known, adapters = manifest["format"], manifest["adapters"]
        schema, sha256, rows = manifest["schema"], manifest["registry_sha256"], manifest["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackupError(f"{str(source)!r} is not a backup: expected a readable {MANIFEST} in it") from error
    if known != FORMAT:
        raise BackupError(f"the backup has the format {known!r}, this version reads {FORMAT}: use the one that made it")
    try:
        check_known(schema)
    except NewerSchemaError as error:
        raise BackupError(f"the backup is of a newer version: {error}; restore it with that version") from error
    if not (source / ROWS).is_file() or _hash(source / ROWS) != sha256:
        raise BackupError(f"{ROWS} of the backup is not as it was written")
    for digest in adapters:
        if not check_adapter(source / ADAPTERS / digest, digest):
            raise BackupError(f"the files of adapter {digest} in the backup are not as they were written")
    if not isinstance(rows, dict):
        raise BackupError(f"{MANIFEST} of the backup is not as it was written")
    return manifest


def restore_backup(settings: Settings, source: Path, say: Say) -> dict[str, Any]:
    """Put a backup where the settings say, which must be empty; returns its manifest. BackupError."""
    manifest = read_manifest(source)
    say(f"the backup of {manifest['created']} is whole")
    with _new_registry(find_url(settings)) as connection:
        store = open_shared_store(settings, settings.data) or Store(settings.data / ADAPTERS, budget_bytes=UNLIMITED)
        for digest in manifest["adapters"]:
            folder = source / ADAPTERS / digest
            store.land(digest, lambda entry, folder=folder: _fill(folder, entry))  # type: ignore[misc]  # one argument
            store.publish(digest)
            say(f"adapter {digest[:12]}")
        # Only now, so that no server begins with rows without files.
        migrate(connection, manifest["schema"] or FIRST)
        insert_rows(connection, source / ROWS)
        migrate(connection)
        about = {"created": manifest["created"], "registry_sha256": manifest["registry_sha256"]}
        append_entry(connection, Entry("registry.restore", "registry", after=about), RESTORER)
        keys = connection.execute(select(KEYS.c.id).where(KEYS.c.revoked.is_(None))).all()
    if settings.store:
        say(
            "it is the same registry as before, and takes out of FUSION_STORE what it does not need: while servers of "
            "the old one run, as in a drill, start it with another FUSION_STORE"
        )
    say(f"registry: {sum(manifest['rows'].values())} rows")
    if keys:
        since = f"revoke those again that have been revoked since {manifest['created']}"
        say(f"{len(keys)} API keys open this registry: {since} (lora-fusion keys)")
    return manifest


@contextmanager
def _new_registry(url: URL) -> Iterator[Connection]:
    """A connection that fills the empty database at `url`: with all of it, or nothing. SQLite commits the first tables
    before any row, so there a file beside it is filled and takes its place.
    """
    path = Path(str(url.database)) if url.get_backend_name() == "sqlite" else None
    target = url if path is None else url.set(database=f"{path}.restoring")
    engine, known = create_engine(target, poolclass=NullPool), create_engine(url, poolclass=NullPool)
    try:
        if path is None or path.exists():
            with known.connect() as connection:
                if any(name not in PASSING for name in inspect(connection).get_table_names()):
                    where = url.render_as_string(hide_password=True)
                    raise BackupError(f"the registry at {where!r} is not empty; nothing is overwritten: name another")
        if path is not None:
            _remove_database(Path(f"{path}.restoring"))  # of one that was killed
        with engine.begin() as connection:
            yield connection
        engine.dispose()
        if path is not None:
            _remove_database(path)
            sync(Path(f"{path}.restoring"))
            Path(f"{path}.restoring").rename(path)
            sync(path.parent)
    finally:
        engine.dispose()
        known.dispose()
        if path is not None:
            _remove_database(Path(f"{path}.restoring"))


def _remove_database(path: Path) -> None:
    """Remove a file of SQLite with what it keeps beside it."""
    for end in ("", "-wal", "-shm", "-journal"):
        Path(f"{path}{end}").unlink(missing_ok=True)


def _fill(source: Path, entry: Path) -> None:
    shutil.copytree(source, entry, dirs_exist_ok=True)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
