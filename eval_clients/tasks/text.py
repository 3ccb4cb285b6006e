"""The text of an evaluation file, whatever it was saved as: gzip or plain, UTF-8, UTF-16 or Windows-1252.

Files that are not text are refused, and the error says what they are: an archive, a saved web page, a Git LFS pointer.
"""

import codecs
import gzip
import io
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from eval_clients.errors import DataError

MAX_BYTES = 512 * 2**20
"""The longest file, uncompressed."""
BINARIES = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook; unpack it, or save the sheet as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; save the sheet as CSV (UTF-8)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it with `zstd -d`",
    b"BZh": "compressed with bzip2; unpack it with `bunzip2`",
    b"\xfd7zXZ": "compressed with xz; unpack it with `unxz`",
    b"%PDF": "a PDF; expected CSV, JSON, JSONL or text",
}
"""First bytes of files that are no text, and what to do with them."""
GZIP = b"\x1f\x8b"
LFS = "version https://git-lfs.github.com/spec/"
PAGE = re.compile(r"<(?:!doctype html|html|\?xml)\b", re.IGNORECASE)
ERROR_PAGE = re.compile(
    r"(?:404: Not Found|Not Found|Entry not found|Repository Not Found|Invalid username or password|Unauthorized"
    r"|Access to (?:dataset|model) \S+ is restricted.*)",
    re.IGNORECASE,
)
"""What a download leaves behind as the whole file when it was not allowed or the address was wrong."""
WESTERN = re.compile(r"[^\W\d_]*[À-ÿŠšŽžŸŒœ][^\W\d_]*|[€‚„…†‡ˆ‰‹›‘’“”•–—˜™\xa0-¿]")
"""What Windows-1252 text holds besides ASCII: words with accents, and signs."""


@dataclass(frozen=True, slots=True)
class Text:
    """The text of a file, and how it was read where that is not plain UTF-8."""

    text: str
    encoding: str = ""
    """Empty for UTF-8, else what was assumed, for people."""


def missing(path: Path) -> DataError:
    """The error for data that does not exist."""
    return DataError(f"{str(path)!r} does not exist; --data expects the evaluation set, which you provide")


def read_bytes(path: Path) -> bytes:
    """The file's bytes, uncompressed if it is gzip; DataError when it cannot be read or is too long."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if data.startswith(GZIP):
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise missing(path) from None
    except IsADirectoryError:
        raise DataError(f"{str(path)!r} is a folder; expected a file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{str(path)!r} is a damaged gzip file ({error}); download it again") from None
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise DataError(f"{str(path)!r} is longer than {MAX_BYTES // 2**20} MiB; split it")
    return data


def decode_text(path: Path, data: bytes) -> Text:
    """The text of a file's bytes; DataError when they are not text, or empty."""
    for magic, what in BINARIES.items():
        if data.startswith(magic):
            raise DataError(f"{str(path)!r} is {what}")
    text = _decode(path, data)
    start = text.text[:1000].lstrip()
    if not text.text.strip():
        raise DataError(f"{str(path)!r} is empty; expected at least one row")
    if start.startswith(LFS):
        raise DataError(f"{str(path)!r} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")
    if PAGE.match(start):
        raise DataError(f"{str(path)!r} is a web page, not the file itself; download the raw file")
    if len(text.text) < 1000 and ERROR_PAGE.fullmatch(text.text.strip()):
        raise DataError(
            f"{str(path)!r} holds only the answer of a failed download, {start.strip()[:100]!r}; download the file "
            "again (for a gated set, after you were granted access)"
        )
    return text


def _decode(path: Path, data: bytes) -> Text:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return Text(data.decode("utf-16"), "UTF-16")
        except UnicodeDecodeError:
            raise DataError(f"{str(path)!r} is not valid UTF-16; save it as UTF-8") from None
    if b"\0" in data:
        raise DataError(f"{str(path)!r} is not text (it holds NUL bytes); expected CSV, JSON, JSONL or text in UTF-8")
    try:
        return Text(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        reason = f"{str(path)!r} is not valid UTF-8 (byte {error.start})"
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        raise DataError(f"{reason}, nor Windows-1252; save it as UTF-8") from None
    parts = [match[0] for match in WESTERN.finditer(text)]
    if sum(map(_count_foreign, parts)) < _count_foreign(text) or _is_garbled(text):
        raise DataError(f"{reason}, and as Windows-1252 it makes no words; save it as UTF-8")
    return Text(text, f"Windows-1252 (not valid UTF-8), such as {parts[0]!r}")


def _count_foreign(text: str) -> int:
    return sum(character > "\x7f" for character in text)


def _is_garbled(text: str) -> bool:
    """Whether a text is one of another encoding: three accents or rare signs in a row, or a capital inside a word."""
    return re.search(r"[^\x00-\x7f«»\xa0–—‘’“”…]{3}|[a-zß-ÿ][À-Þ]", text) is not None


def read_text(path: Path) -> str:
    """The file's text; DataError when it is absent, no text, or empty."""
    return decode_text(path, read_bytes(path)).text
