"""A .tar archive of an adapter's two files, read by hand: a general reader does far more than two files need.

Read are the headers that GNU tar, bsdtar, Python and Docker write: POSIX ustar, pax records of a member's path, and
GNU long names. Members are found by the last part of their path; links, devices and folders are skipped.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from adapters.errors import AdapterError, quote
from adapters.files.layout import CONFIG, WEIGHTS, reject_weights

BLOCK = 512
MAX_HEADERS = 256
"""Headers in one archive. bsdtar writes four for each file of macOS: two members, each with a pax header."""
MAX_EXTENSION_BYTES = 2**18
"""Bytes of all pax headers and long names together."""
CHUNK_BYTES = 2**20

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_FILES, _WITHOUT_DATA = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6")
_SPARSE, _PAX, _GLOBAL_PAX, _LONG_NAME, _LONG_LINK = b"S", b"x", b"g", b"L", b"K"


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file in the archive: its path, its first byte and how many there are."""

    path: bytes
    start: int
    size: int


def unpack_adapter(file: IO[bytes], folder: Path) -> None:
    """Copy the adapter's two files out of the archive into `folder`, and nothing else.

    AdapterError 'bad_archive' when it is compressed, damaged, too large or holds a file twice, or a part is missing;
    what is written is never larger than `file`.
    """
    members: dict[str, Member] = {}
    others: list[str] = []
    for member in _read_members(file):
        name = member.path.rpartition(b"/")[2].decode(errors="replace")
        if name not in (CONFIG, WEIGHTS):
            others.append(name)
            continue
        if name in members:
            both = " and ".join(quote(path.decode(errors="replace")) for path in (members[name].path, member.path))
            raise _reject(f"holds two files {name!r}, {both}: put one adapter's folder into it")
        members[name] = member
    if WEIGHTS not in members and any(name.startswith("adapter_model") for name in others):
        raise reject_weights("the archive", others)
    for name in (CONFIG, WEIGHTS):
        if name not in members:
            raise _reject(f"holds no plain file {name!r}: put an adapter's {CONFIG} and {WEIGHTS} into it")
    for name, member in members.items():
        _copy(file, member, folder / name)


def _reject(fault: str) -> AdapterError:
    return AdapterError("bad_archive", f"the uncompressed .tar archive {fault}")


def _read_members(file: IO[bytes]) -> Iterator[Member]:
    """The plain files. One header after the other is read; what lies between is not."""
    end = file.seek(0, 2)
    at, path, extensions = 0, b"", 0
    for count in range(MAX_HEADERS + 1):
        file.seek(at)
        header = file.read(BLOCK)
        if not header.strip(b"\0") and at:
            return  # the end: blocks of zeros, or of the file
        if count == MAX_HEADERS:
            raise _reject(f"has over {MAX_HEADERS} headers: leave out everything but {CONFIG} and {WEIGHTS}")
        kind, size = _check_header(header), 0
        start = at + BLOCK
        if kind not in _WITHOUT_DATA:
            size = _read_number(header[124:136])
            if not 0 <= size <= end - start:
                raise _reject(f"is cut short: a member at byte {at} would have {size} bytes")
        at = start + -(-size // BLOCK) * BLOCK
        if kind in (_PAX, _GLOBAL_PAX, _LONG_NAME, _LONG_LINK):
            extensions += size
            if extensions > MAX_EXTENSION_BYTES:
                raise _reject(f"has pax headers of over {MAX_EXTENSION_BYTES} bytes: make it with --format=ustar")
            path = _read_extension(file.read(size), kind) or path
            continue
        path = path or _read_path(header)
        if kind in _FILES and not path.endswith(b"/"):  # of a folder, in the oldest form
            yield Member(path, start, size)
        path = b""


def _check_header(header: bytes) -> bytes:
    """The type of a member; AdapterError unless the header's sum is right."""
    for magic, packer in _COMPRESSED.items():
        if header.startswith(magic):
            raise AdapterError(
                "bad_archive",
                f"an uncompressed .tar archive is expected, this is {packer}: unpack it and pack it with `tar -cf`, or "
                "make a plain folder of it with `lora-fusion convert FILE --out DIR`",
            )
    if len(header) < BLOCK:
        raise _reject("is cut short inside a header: send it again")
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])  # as some old programs add up
    if _read_number(header[148:156]) not in (unsigned, signed):
        raise AdapterError("bad_archive", "an uncompressed .tar archive is expected, this is none, or a damaged one")
    kind = header[156:157]
    if kind == _SPARSE:
        raise _reject("holds a sparse file: make it without --sparse")
    return kind


def _read_number(field: bytes) -> int:
    """Octal digits, or GNU's binary form; -1 for anything else, and for what is negative."""
    if field[0] & 0x80:
        return -1 if field[0] & 0x40 else int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        return -1
    return int(digits or b"0", 8)


def _read_path(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _read_extension(content: bytes, kind: bytes) -> bytes:
    """The path that a pax header or a GNU long name gives the next member, or nothing."""
    if kind in (_LONG_NAME, _LONG_LINK):
        return content.split(b"\0")[0] if kind == _LONG_NAME else b""
    records = _read_records(content)
    odd = [key for key in records if key == b"size" or key.startswith(b"GNU.sparse.")]
    if odd or (kind == _GLOBAL_PAX and b"path" in records):
        raise _reject("has pax headers that change how members are read: make it with --format=ustar")
    return records.get(b"path", b"")


def _read_records(content: bytes) -> Mapping[bytes, bytes]:
    """Records of a pax header, "LENGTH KEY=VALUE\\n" each, LENGTH being that of all of it."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(content):
        digits = content[at : at + 6].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = content[at : at + length]
        key, equals, value = record[len(digits) + 1 :].partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise _reject("has a damaged pax header")
        records[key] = value[:-1]
        at += length
    return records


def _copy(file: IO[bytes], member: Member, target: Path) -> None:
    file.seek(member.start)
    left = member.size
    with target.open("xb") as out:
        while left:
            chunk = file.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise _reject("was shortened while it was read")
            out.write(chunk)
            left -= len(chunk)
