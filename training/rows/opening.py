"""Files of training rows as streams: decompressed, their size bounded, their text encoding known."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from training.errors import ConfigError

MAX_BYTES = 2**32
"""Size of a compressed file once it is decompressed."""
_CHUNK = 2**20
_MAX_FOREIGN_SHARE = 1 / 8
"""Share of bytes beyond ASCII up to which a text is taken for Windows-1252: Western European languages stay below, the
8-bit encodings of other scripts exceed it.
"""
_UNDEFINED = (0x81, 0x8D, 0x8F, 0x90, 0x9D)
"""Bytes that Windows-1252 has no character for."""
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_FOREIGN = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer instead of the file: run `git lfs pull`",
    b"/annex/objects/": "a git-annex pointer instead of the file: run `git annex get`",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"\x1f\x8b": "compressed twice: unpack it once",
    b"ARROW1": "an Arrow file: save it as Parquet",
    b"\x80\x04\x95": "a pickle, which is not read because it can run code: save it as JSONL",
    b"\x80\x05\x95": "a pickle, which is not read because it can run code: save it as JSONL",
    b"SQLite format 3": "an SQLite database: save its table as CSV",
    b"<!doctype html": "a web page instead of the file: download the file itself",
    b"<html": "a web page instead of the file: download the file itself",
}
"""What files that hold no rows begin with, in lower case where it is text."""


def _open_zstd(path: Path) -> BinaryIO:
    return cast(BinaryIO, load_pyarrow(path).input_stream(str(path), compression="zstd"))


_COMPRESSIONS: dict[bytes, tuple[str, Callable[[Path], Any]]] = {
    b"\x1f\x8b": (".gz", gzip.open),
    b"\x28\xb5\x2f\xfd": (".zst", _open_zstd),
    b"BZh": (".bz2", bz2.open),
    b"\xfd7zXZ\0": (".xz", lzma.open),
}
"""First bytes of compressed files, with their suffix and what opens them."""


def load_pyarrow(path: Path) -> Any:
    """The package, with its Parquet reader; ConfigError that says how to install it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{path.name} needs the package pyarrow: pip install 'lora-fusion[train]'") from None
    return pyarrow


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed; ConfigError when they are damaged."""
    with path.open("rb") as raw:
        head = raw.read(8)
    opener = next((opener for magic, (_, opener) in _COMPRESSIONS.items() if head.startswith(magic)), None)
    try:
        with opener(path) if opener else path.open("rb") as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(f"{path.name} is cut short or damaged: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ConfigError(f"{path.name} is cut short or damaged: {error}") from None  # bz2 and zstd


def find_suffix(path: Path) -> str:
    """The suffix in lower case, that of a compression left out."""
    name = path.name.lower()
    for suffix, _ in _COMPRESSIONS.values():
        name = name.removesuffix(suffix)
    return Path(name).suffix


def find_encoding(path: Path) -> str:
    """The text's encoding: UTF-8, what its byte order mark says, or Windows-1252 where the bytes allow no other.

    Reads the whole file once. ConfigError when it is not text, or expands to more than MAX_BYTES.
    """
    limit = max(MAX_BYTES, path.stat().st_size)
    size = foreign = 0
    failure: UnicodeDecodeError | None = None
    with open_bytes(path) as stream:
        head = stream.read(_CHUNK)
        _refuse_foreign(path, head)
        encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
        decoder = codecs.getincrementaldecoder(encoding)()
        is_western = encoding == "utf-8"
        chunk = head
        while True:
            size += len(chunk)
            if size > limit:
                raise ConfigError(f"{path.name} expands to more than {limit} bytes: split it into smaller files")
            foreign += len(chunk.translate(None, bytes(range(128))))
            try:
                if failure is None:
                    decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                failure = error
            is_western = is_western and not any(byte in chunk for byte in _UNDEFINED)
            if not chunk:
                break
            chunk = stream.read(_CHUNK)
    if failure is None:
        return encoding
    if is_western and foreign <= size * _MAX_FOREIGN_SHARE:
        return "cp1252"
    raise ConfigError(f"{path.name} is not valid UTF-8: {failure}; save it as UTF-8")


def _refuse_foreign(path: Path, head: bytes) -> None:
    start = head[:200].lstrip()
    for magic, what in _FOREIGN.items():
        if start.startswith(magic) or start.lower().startswith(magic):
            raise ConfigError(f"{path.name} is {what}")
    if b"\0" in head and not head.startswith(tuple(_BYTE_ORDER_MARKS)):
        raise ConfigError(f"{path.name} holds binary data: expected JSON, JSONL, CSV, TSV or Parquet, text as UTF-8")


@contextmanager
def open_text(path: Path, encoding: str, newline: str) -> Iterator[TextIO]:
    """The file's text, decompressed; `newline` as in `open`."""
    with open_bytes(path) as stream, io.TextIOWrapper(stream, encoding=encoding, newline=newline) as text:
        yield text
