"""`lora-fusion backup` and `lora-fusion restore`: a server's adapters, profiles, scorecards, keys and audit."""

import argparse
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from adapters.files import land_folder, sync
from service.backup import MANIFEST, BackupError, restore_backup, write_backup
from service.data_folder import hold_data_folder, scratch_folder
from service.errors import ApiError
from service.settings import SettingsError, read_settings

WHERE = """The registry and the store are those of the FUSION_* variables (FUSION_DATA, FUSION_DATABASE, FUSION_STORE).
PATH is a folder, or a file that ends in .tar."""
TEXTS = {
    "backup": f"Back up the registry and its adapters' files while servers go on running. {WHERE}",
    "restore": f"Verify a backup and put it into an empty data folder and database, which no server uses. {WHERE}",
}


def main(argv: Sequence[str] | None = None, *, prog: str = "lora-fusion") -> int:
    """Run one of the commands; 0: done, 1: it could not be, 2: invalid usage or settings."""
    args = list(sys.argv[1:] if argv is None else argv)
    command, rest = args[0], args[1:]
    parser = argparse.ArgumentParser(prog=f"{prog} {command}", description=TEXTS[command])
    parser.add_argument("path", type=Path, metavar="PATH", help="never overwritten" if command == "backup" else None)
    path = parser.parse_args(rest).path
    try:
        settings = read_settings()
        if command == "backup":
            with _new(path) as folder:
                manifest = write_backup(settings, folder, _say)
        else:
            with hold_data_folder(settings.data), _opened(path, settings.data) as folder:
                manifest = restore_backup(settings, folder, _say)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        print(f"error: the registry's database failed: {reason}", file=sys.stderr)
        return 1
    except (BackupError, ApiError, OSError, RuntimeError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'backed up' if command == 'backup' else 'restored'}: {len(manifest['adapters'])} adapters, {path}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _new(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end: whole, or not at all."""
    if path.exists():
        raise BackupError(f"{str(path)!r} exists; nothing is overwritten: name another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".backup-") as scratch:
        folder, tar = Path(scratch, "backup"), Path(scratch, "backup.tar")
        yield folder
        if path.suffix == ".tar":
            with tarfile.open(tar, "x") as archive:
                archive.add(folder, arcname="backup")
            tar.chmod(0o600)  # it has hashes of keys, and system prompts
            sync(tar)
            tar.rename(path)
            sync(path.parent)
        else:
            folder.chmod(0o700)
            land_folder(folder, path)


@contextmanager
def _opened(path: Path, data: Path) -> Iterator[Path]:
    """The folder of a backup; that of a .tar is unpacked in `data` for the block, since its own may be read-only."""
    if path.is_dir():
        yield path
        return
    if not path.is_file():
        raise BackupError(f"no backup found at {str(path)!r}: expected a folder with {MANIFEST}, or a .tar file of one")
    with scratch_folder(data, "restore") as scratch:  # whoever has the folder next removes what a kill leaves
        with tarfile.open(path, "r:") as archive:  # as it was written: not compressed
            archive.extractall(scratch, filter=_check_member)
        yield scratch / "backup"


def _check_member(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """A plain file or folder, which is all that a backup has; BackupError for others: links, and what is sparse."""
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise BackupError(
            f"it holds {member.name[:100]!r}, which is neither a plain file nor a folder; "
            "restore an archive that `lora-fusion backup` wrote"
        )
    return tarfile.data_filter(member, folder)
