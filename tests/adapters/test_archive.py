"""Archives of uploads: what usual programs write is read, and anything else ends in milliseconds."""

import gzip
import io
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters import AdapterError, load, save
from adapters.files import unpack_adapter
from tests.adapters.samples import CONFIG, WEIGHTS, adapter, same


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(adapter(1), tmp_path / "run" / "adapter")
    (tmp_path / "run" / "adapter" / "README.md").write_text("x" * 5000)
    return tmp_path / "run"


def header(
    name: bytes, size: int | bytes, kind: bytes = b"0", *, magic: bytes = b"ustar\x0000", prefix: bytes = b""
) -> bytes:
    """A header with the right sum."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0" + b" " * 8 + kind
    block = (block + bytes(100) + magic).ljust(345, b"\0") + prefix.ljust(155, b"\0") + bytes(12)
    assert len(block) == 512
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def member(name: bytes, content: bytes, kind: bytes = b"0", *, prefix: bytes = b"") -> bytes:
    return header(name, len(content), kind, prefix=prefix) + content + bytes(-len(content) % 512)


def record(key: bytes, value: bytes) -> bytes:
    """One line of a pax header."""
    length = len(key) + len(value) + 3
    total = length + len(str(length))
    total = length + len(str(total))
    return b"%d %s=%s\n" % (total, key, value)


def unpack(content: bytes, out: Path) -> None:
    out.mkdir()
    unpack_adapter(io.BytesIO(content), out)


def python_tar(folder: Path, *, format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        tar.add(folder, arcname=f"{'long/' * 60}ü/{folder.name}" if format != tarfile.USTAR_FORMAT else "../../x")
    return buffer.getvalue()


def gnu_tar(*options: str) -> Callable[[Path], bytes]:
    def pack(folder: Path) -> bytes:
        command = ["tar", "-c", *options, "-C", str(folder.parent), folder.name]
        return subprocess.run(command, capture_output=True, check=True).stdout

    return pack


def apple_tar(folder: Path) -> bytes:
    """As bsdtar on macOS: for each file one with its attributes, both with pax headers."""
    pax = record(b"mtime", b"1764215400.123") + record(b"LIBARCHIVE.xattr.com.apple.provenance", b"AQAA\n=")
    parts = [member(b"./._a", b"\0\5\x16\7"), header(b"./", 0, b"5")]
    for file in folder.rglob("*.*"):
        for name, content in (
            (b"._" + file.name.encode(), b"\0\5\x16\7" * 40),
            (file.name.encode(), file.read_bytes()),
        ):
            parts += [member(b"./PaxHeader/" + name[:20], pax, b"x"), member(b"./" + name, content)]
    return b"".join(parts) + bytes(1024)


@pytest.mark.parametrize(
    "pack",
    [
        gnu_tar(),
        gnu_tar("--format=ustar"),
        gnu_tar("--format=posix", "--xattrs"),
        gnu_tar("--format=v7"),
        gnu_tar("--format=oldgnu", "--transform=s,^," + "deep/" * 40 + ","),
        gnu_tar("--format=posix", "--transform=s,^," + "deep/" * 60 + ","),
        gnu_tar("-b1"),
        lambda folder: python_tar(folder, format=tarfile.PAX_FORMAT),
        lambda folder: python_tar(folder, format=tarfile.GNU_FORMAT),
        lambda folder: python_tar(folder, format=tarfile.USTAR_FORMAT),
        apple_tar,
    ],
)
def test_what_usual_programs_write_is_read(tmp_path: Path, folder: Path, pack: Callable[[Path], bytes]) -> None:
    unpack(pack(folder), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS}
    assert same(load(tmp_path / "out"), adapter(1))


GOOD = member(CONFIG.encode(), b"{}")
BOTH = GOOD + member(WEIGHTS.encode(), b"x")


def test_links_devices_and_folders_are_skipped(tmp_path: Path) -> None:
    odd = b"".join(header(WEIGHTS.encode(), 512, kind) for kind in (b"1", b"2", b"3", b"4", b"5", b"6"))
    folders = header(CONFIG.encode() + b"/", 0, b"0")
    unpack(odd + folders + GOOD + member(b"../../" + WEIGHTS.encode(), b"x"), tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == b"x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(AdapterError, match="no plain file 'adapter_model.safetensors'"):
        unpack(odd + GOOD, tmp_path / "again")


def test_prefixes_binary_sizes_and_a_missing_end_are_read(tmp_path: Path) -> None:
    weights = header(WEIGHTS.encode(), b"\x80" + (3).to_bytes(11, "big"), prefix=b"some/folder") + b"abc" + bytes(509)
    unpack(GOOD + weights, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == b"abc"


def bomb_negative() -> bytes:
    records = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.realsize", b"-1000000000000")
    return member(b"x", records, b"x") + member(WEIGHTS.encode(), b"1\n0\n536870912\n")


HOSTILE: dict[str, tuple[bytes, str]] = {
    "loop": (header(b"x", b"\xff" * 10 + b"\xfe\0") + BOTH, "cut short"),
    "loop in octal": (header(b"x", b"-0000001000\0") + BOTH, "cut short"),
    "negative": (bomb_negative(), "change how members are read"),
    "sparse": (header(WEIGHTS.encode(), 512, b"S") + bytes(512) + GOOD, "sparse"),
    "pax digits": (member(b"x", b"1" * 80_000, b"x") + BOTH, "damaged pax header"),
    "pax of a size": (member(b"x", record(b"size", b"9" * 30), b"x") + BOTH, "change how members are read"),
    "pax for all": (member(b"x", record(b"path", b"y"), b"g") + BOTH, "change how members are read"),
    "large pax": (member(b"x", b"1 " * 200_000, b"x") + BOTH, "pax headers of over"),
    "many pax": (member(b"x", record(b"a", b"b") * 10_000, b"x") * 10 + BOTH, "pax headers of over"),
    "empty members": (header(b"x", 0) * 2000 + BOTH, "over 256 headers"),
    "beyond the end": (GOOD + header(WEIGHTS.encode(), 2**33 - 1), "cut short"),
    "binary beyond the end": (GOOD + header(WEIGHTS.encode(), b"\x80" + b"\x7f" * 11), "cut short"),
    "no number": (header(WEIGHTS.encode(), b"0x000000011\0") + GOOD, "cut short"),
    "half a header": (BOTH + header(b"x", 0)[:100], "cut short inside a header"),
    "wrong sum": (BOTH.replace(b"0000644", b"0000755"), "none, or a damaged one"),
    "gzip": (gzip.compress(BOTH), "this is gzip"),
    "zip": (b"PK\3\4" + bytes(600), "this is zip"),
    "text": (b"x" * 2000, "none, or a damaged one"),
    "zeros": (bytes(2**20), "none, or a damaged one"),
    "nothing": (b"", "cut short"),
    "twice": (BOTH + member(b"checkpoint-9/" + CONFIG.encode(), b"{}"), "holds two files"),
    "half": (GOOD, "no plain file 'adapter_model.safetensors'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused_in_milliseconds(tmp_path: Path, case: str) -> None:
    content, words = HOSTILE[case]
    start = time.process_time()
    with pytest.raises(AdapterError, match=words) as caught:
        unpack(content, tmp_path / "out")
    assert time.process_time() - start < 0.5
    assert caught.value.reason == "bad_archive"
    assert len(str(caught.value)) < 400
    assert not list((tmp_path / "out").iterdir())
