"""Where an adapter is read from: a folder, an archive of one, or a file of weights with its configuration beside it."""

import json
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from safetensors.torch import save_file
from torch import Tensor

from adapters.convert.weights import find_weights, is_weights, read_weights
from adapters.errors import AdapterError, quote
from adapters.files.json_text import note_repeated, read_object
from adapters.files.layout import CONFIG, WEIGHTS, reject_config

MAX_MEMBERS = 10_000
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
)
"""What the readers of archives raise for files that they cannot read."""


@dataclass(frozen=True, slots=True)
class RawAdapter:
    """An adapter as its files have it: the configuration's keys, and the tensors by PEFT's names."""

    config: dict[str, object]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def read_source(path: Path) -> RawAdapter:
    """The adapter at `path`: a folder, a .zip or .tar (also compressed) of one, or its file of weights, or one of their
    parts. A pickle is read by `pickles`. AdapterError, by reason, when there is none, or more than one.
    """
    with TemporaryDirectory(prefix="lora-fusion-") as scratch:
        folder, only = _find_folder(path, Path(scratch))
        repeated: list[str] = []
        config = read_object((folder / CONFIG).read_bytes(), CONFIG, repeated)
        files, notes = find_weights(folder, only)
        return RawAdapter(config, read_weights(files, Path(scratch)), (*note_repeated(repeated), *notes))


def write_raw(adapter: RawAdapter, folder: Path) -> None:
    """Write the two files as they are into an existing folder."""
    (folder / CONFIG).write_text(json.dumps(adapter.config))
    save_file({name: tensor.contiguous() for name, tensor in adapter.tensors.items()}, folder / WEIGHTS)


def _find_folder(path: Path, scratch: Path) -> tuple[Path, str]:
    """The folder that has the configuration, and the name of the file of weights in it if one was asked for."""
    if path.is_dir():
        folder, only = path, ""
    elif not path.exists():
        raise AdapterError(
            "missing_config", f"{quote(path.name)} does not exist: expected a folder, an archive or a file"
        )
    elif is_weights(path.name):
        folder, only = path.parent, path.name
        if not (folder / CONFIG).is_file():
            raise AdapterError(
                "missing_config", f"there is no {CONFIG} beside {quote(path.name)}: both make an adapter"
            )
    else:
        folder, only = scratch / "unpacked", ""
        folder.mkdir()
        _unpack(path, folder)
    if not (folder / CONFIG).is_file():
        raise reject_config(folder)
    return folder, only


def _unpack(path: Path, folder: Path) -> None:
    """Copy an archive's plain files of an adapter's names into `folder`; 'bad_archive' when there are two of a name."""
    paths: dict[str, str] = {}
    try:
        with _open_archive(path) as members:
            for count, (member, stream) in enumerate(members):
                member = member.replace("\\", "/")  # as some programs of Windows write paths
                name = member.rpartition("/")[2]
                if count > MAX_MEMBERS:
                    raise AdapterError("bad_archive", f"{quote(path.name)} holds over {MAX_MEMBERS} files")
                if name != CONFIG and not is_weights(name):
                    continue
                if name in paths:
                    raise AdapterError(
                        "bad_archive",
                        f"{quote(path.name)} holds two files {name!r}, {quote(paths[name])} and {quote(member)}: "
                        "unpack it and convert the folder that you mean",
                    )
                paths[name] = member
                with stream() as source, (folder / name).open("xb") as target:
                    shutil.copyfileobj(source, target, 2**20)
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise AdapterError("bad_archive", f"{quote(path.name)} cannot be read as an archive: {error}") from error
    if len({member.rpartition("/")[0] for member in paths.values()}) > 1:
        both = " and ".join(map(quote, list(paths.values())[:2]))
        raise AdapterError("bad_archive", f"{quote(path.name)} holds {both}, which are not of one folder")
    if not paths:
        raise AdapterError("bad_archive", f"{quote(path.name)} holds no {CONFIG}: expected the archive of an adapter")


@contextmanager
def _open_archive(path: Path) -> Iterator[Any]:
    """The plain files of an archive: path and what opens it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield ((info.filename, _opener(archive, info)) for info in archive.infolist() if not info.is_dir())
    else:
        with tarfile.open(path, "r:*") as tar:
            yield ((info.name, _extractor(tar, info)) for info in tar if info.isfile())


def _opener(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    return lambda: archive.open(info)


def _extractor(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Any:
    def extract() -> IO[bytes]:
        stream = tar.extractfile(info)
        assert stream is not None
        return stream

    return extract
