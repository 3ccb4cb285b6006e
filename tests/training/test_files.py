"""Files as people have them, by the number of the report they came from, and files that hold no rows."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from training.errors import ConfigError
from training.rows import files, opening
from training.rows.readers import Source, read_chats
from training.rows.shapes import Ledger

ROWS = [{"prompt": f"Q{i}?", "answer": f"Ä {i}"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
GZIPPED = gzip.compress(LINES.encode(), mtime=0)  # the same in every process that collects the tests


def compress_zstd(data: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))


def table(delimiter: str, header: str = "prompt,answer") -> str:
    lines = [header, *(f"{row['prompt']},{row['answer']}" for row in ROWS)]
    return "\n".join(lines).replace(",", delimiter) + "\n"


FILES: list[tuple[str, str | bytes]] = [
    # F8
    ("x.jsonl", LINES),
    ("x.jsonl", json.dumps(ROWS)),
    ("x.jsonl", json.dumps(ROWS, indent=2)),
    ("x.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
    ("x.json", LINES),
    ("x.json", json.dumps({"data": ROWS, "version": "1"})),
    ("x.json", json.dumps({"train": ROWS, "test": ROWS[:1]}, indent=2)),
    ("x.json", json.dumps({"data": {"train": ROWS}, "x": {}})),
    ("x.json", json.dumps({"prompts and answers": ROWS})),
    ("x.json", json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]})),
    ("x.json", json.dumps({key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]})),
    ("x.json", json.dumps({f"id-{i}": row for i, row in enumerate(ROWS)})),
    ("x.json", json.dumps({"columns": list(ROWS[0]), "index": [0, 1, 2], "data": [list(r.values()) for r in ROWS]})),
    ("x.JSON", json.dumps(ROWS)),
    ("x.ndjson", LINES),
    ("x", LINES),
    ("x.txt", LINES),
    ("x.csv", LINES),
    ("x.CSV", table(",")),
    ("x.tsv", table("\t")),
    ("x.jsonl.gz", GZIPPED),
    ("x.JSONL.GZ", GZIPPED),
    ("x.jsonl", GZIPPED),
    ("x.jsonl.zst", compress_zstd(LINES.encode())),
    ("x.csv.zst", compress_zstd(table(",").encode())),
    ("x.csv.bz2", bz2.compress(table(",").encode())),
    ("x.json.xz", lzma.compress(json.dumps(ROWS).encode())),
    # F10
    ("x.csv", table(";")),
    ("x.csv", table("\t")),
    ("x.csv", table("|")),
    ("x.csv", "sep=;\n" + table(";")),
    ("x.csv", table(",").encode("cp1252")),
    ("x.csv", table(",").encode("utf-16")),
    ("x.jsonl", LINES.encode("utf-8-sig")),
    ("x.jsonl", LINES.encode("utf-16")),
    ("x.csv", table(",", " Prompt , Answer ")),
    ("x.csv", table(", ")),
]


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(("name", "content"), FILES)
def test_a_file_is_read(name: str, content: str | bytes, tmp_path: Path) -> None:
    chats = read_chats(str(write(tmp_path, name, content)))
    assert [(chat.prompt, chat.answer) for chat in chats] == [(row["prompt"], row["answer"]) for row in ROWS]
    assert all(chat.where.startswith(f"{name}:") for chat in chats)


def test_a_parquet_file_is_read(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "n": 1.0}] * 3
    path = tmp_path / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)  # F8
    chats = read_chats(str(path))
    assert [(chat.prompt, chat.answer) for chat in chats] == [("Q", "A")] * 3
    assert chats[1].where == f"{path.name}:[2]"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ConfigError, match="is not valid Parquet"):
        read_chats(str(path))


def test_fields_that_arrow_adds_to_the_objects_of_a_row_are_left_out(tmp_path: Path) -> None:
    """Review: a tool call of Parquet has the arguments of all others, as null."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": {name: 1}}} for name in "xy"]
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    rows = [{"messages": [user, {"role": "assistant", "content": "", "tool_calls": [call]}, answer]} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    chats = read_chats(str(tmp_path / "x.parquet"))
    assert [chat.extras for chat in chats] == [{1: {"tool_calls": [call]}} for call in calls]


def test_a_field_may_be_long_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (chat,) = read_chats(str(write(tmp_path, "x.csv", f"prompt,answer\nQ,{'long ' * 40_000}\n")))  # F10
    assert len(chat.answer) == 200_000
    assert csv.field_size_limit() == before


def test_how_a_file_was_read_is_noted(tmp_path: Path) -> None:
    def note(name: str, content: str | bytes) -> list[str]:
        ledger = Ledger()
        Source(str(write(tmp_path, name, content))).read(ledger)
        return ledger.notes

    assert note("x.csv", table(";").encode("cp1252")) == [
        "x.csv is read as Windows-1252",
        "x.csv: the columns are separated by ';'",
    ]
    assert note("x.json", json.dumps({"train": ROWS, "test": ROWS})) == [
        "x.json: the rows of 'train' are read, not 'test'"
    ]
    assert note("x.tsv", table("\t")) == []
    path = write(tmp_path, "x.json", json.dumps({"train": ROWS, "test": ROWS[:1]}))
    assert len(read_chats(str(path), split="test")) == 1


FOREIGN: list[tuple[str, bytes, str]] = [
    ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),  # F8
    ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
    ("x.csv", b"/annex/objects/MD5E-s1--0.csv\n", "is a git-annex pointer"),
    ("x.json", b"<!DOCTYPE html><html></html>", "is a web page instead of the file"),
    ("x.xlsx", b"PK\x03\x04" + bytes(40), "is a zip archive or a spreadsheet"),
    ("x.pkl", b"\x80\x04\x95" + bytes(9), "is a pickle, which is not read"),
    ("x.arrow", b"ARROW1\0\0" + bytes(9), "is an Arrow file"),
    ("x.jsonl", b'{"prompt"\0', "holds binary data"),
    ("x.jsonl", '{"prompt": "вопрос", "answer": "ответ"}\n'.encode("cp1251"), "is not valid UTF-8.*save it as UTF-8"),
    ("x.jsonl.gz", GZIPPED[:-12], "is cut short or damaged"),
    ("x.jsonl.gz", gzip.compress(GZIPPED, mtime=0), "is compressed twice"),
    ("x.jsonl.zst", compress_zstd(LINES.encode())[:-4], "is cut short or damaged"),
    ("x.yaml", b"prompt: Q\nanswer: A\n", "has the suffix '.yaml': expected JSON, JSONL, CSV, TSV or Parquet"),
    ("x.csv", b'"prompt,answer\nQ,A\n', "is not valid CSV|has the columns|has no rows"),
    ("x.json", b"", "has no rows"),
    ("x.json", b"{}", "has the columns .none."),
    ("x.json", b"[1, 2]", r"x\.json:\[1\] has '1', which matches no known format"),
    ("x.jsonl", b"[" * 100_000, "is not valid JSON"),
    ("x.jsonl", b"9" * 10_000, "is not valid JSON|has"),
]


@pytest.mark.parametrize(("name", "content", "message"), FOREIGN)
def test_a_file_without_rows_is_refused_by_its_kind(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_chats(str(write(tmp_path, name, content)))


def test_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder: expected a file"):
        read_chats(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.jsonl", LINES + '{"prompt": "cut', r"x\.jsonl:4 is not valid JSON"),
        ("x.jsonl", "oops\n" + LINES, r"x\.jsonl:1 is not valid JSON"),
        ("x.csv", table(",") + "only one\n", r"x\.csv:5 does not have as many fields as the header: 1 instead of 2"),
        ("x.csv", table(",") + "a,b,c\n", r"x\.csv:5 does not have as many fields as the header: 3 instead of 2"),
        ("x.csv", table(",").replace("\n", '\n"Say" it,A\n', 1), r"x\.csv:2 is not valid CSV"),
        ("x.csv", table(",") + '"never closed,A\n', r"x\.csv:5 is not valid CSV"),
        ("x.csv", table(",") + '"not closed,A\nQ,A\n"Say" it,A\n', r"x\.csv:5 is not valid CSV.* lines up to 7, which"),
    ],
)
def test_a_broken_row_is_left_out_and_the_others_are_read(name: str, content: str, reason: str, tmp_path: Path) -> None:
    path = str(write(tmp_path, name, content))
    ledger = Ledger()
    assert len(Source(path).read(ledger)) == len(ROWS)
    with pytest.raises(ConfigError, match=f"^{reason}"):
        read_chats(path)
    assert len(ledger.left_out) == 1


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('"Say it,A\nQ,A\nThe 5",A\n', "lines 2 to 4 are one row"),
        ('Q,A\n"Say it,A\nThe 5",A\n' * 5, "lines 3 to 4, 6 to 7, 9 to 10, and 2 more are one row"),
        ('"Roses are red,\nviolets, too",A\n', ""),
        ('"Is it here, or\nthere, or\nelsewhere",A\n', ""),
        ('"one\ntwo",A\n', ""),
        ('"Sort this:\nb,1\na,2",A\n', ""),
        ('Q,"Here it is:\nname,age\nAda,36"\n', ""),
        ('"name,age\nAda,36\n",A\n', ""),
        ('"say ""it"",A\nQ,A\nx",A\n', ""),
    ],
)
def test_rows_that_a_stray_quote_has_joined_are_named(content: str, lines: str, tmp_path: Path) -> None:
    """r24: the quote that closes may come before a comma by chance, lines later."""
    ledger = Ledger()
    Source(str(write(tmp_path, "x.csv", "prompt,answer\n" + content))).read(ledger)
    assert [lines in note for note in ledger.notes] == [True] * bool(lines), ledger.notes


# r24: lines and cells of a table that are not data
TABLES: list[tuple[str, list[tuple[str, str]], list[str]]] = [
    ("prompt,answer\nQ,A\nprompt,answer\nR,B\n", [("Q", "A"), ("R", "B")], ["x.csv:3 is the header again"]),
    ("| prompt | answer |\n|---|:--|\n| Q | A |\n", [("Q", "A")], ["x.csv:2 is the rule of a Markdown table"]),
    ("prompt,answer\nQ,nan\nR,B\n", [("R", "B")], ["x.csv:2: the content of the assistant turn is 'None'"]),
    ("prompt,answer\nQ,None\n", [("Q", "None")], []),
    ("question,context,answer\nQ,NaN,A\nR,None,B\nS,C,D\n", [("Q", "A"), ("R", "B"), ("S\n\nC", "D")], []),
    ("system,prompt,answer\nnull,Q,A\n", [("Q", "A")], []),
    ("prompt , answer\nQ , A\n", [("Q", "A")], []),
]


@pytest.mark.parametrize(("content", "pairs", "left_out"), TABLES)
def test_what_is_no_row_of_a_table_is_left_out(
    content: str, pairs: list[tuple[str, str]], left_out: list[str], tmp_path: Path
) -> None:
    ledger = Ledger()
    chats = Source(str(write(tmp_path, "x.csv", content))).read(ledger)
    assert [(chat.prompt, chat.answer) for chat in chats] == pairs
    assert [row[: len(start)] for row, start in zip(ledger.left_out, left_out, strict=True)] == left_out


@pytest.mark.parametrize(
    "bad", ['{"prompt": "Q", "answer": "A", "answer": "B"}', '{"prompt": "Q", "messages": [{"a": 1, "a": 2}]}']
)
def test_a_key_twice_is_no_row(bad: str, tmp_path: Path) -> None:
    """r24: JSON's reader would take the last."""
    ledger = Ledger()
    assert len(Source(str(write(tmp_path, "x.jsonl", LINES + bad + "\n"))).read(ledger)) == len(ROWS)
    (left_out,) = ledger.left_out
    assert "occurs twice" in left_out
    with pytest.raises(ConfigError, match="occurs twice"):
        read_chats(str(write(tmp_path, "y.jsonl", bad + "\n")))


BOMBS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": compress_zstd, "xz": lzma.compress}


@pytest.mark.parametrize("kind", BOMBS)
def test_what_a_file_expands_to_is_bounded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, f"x.jsonl.{kind}", BOMBS[kind](b" " * 2**23))
    monkeypatch.setattr(opening, "MAX_BYTES", 2**22)
    with pytest.raises(ConfigError, match="expands to more than 4194304 bytes: split it"):
        read_chats(str(path))


def test_the_length_of_a_row_and_of_a_document_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ROW_CHARACTERS", 30)
    for name in ("x.jsonl", "x.csv"):
        with pytest.raises(ConfigError, match=r"has a line of more than 30 characters"):
            read_chats(str(write(tmp_path, name, "x" * 40)))
    monkeypatch.setattr(files, "MAX_DOCUMENT_CHARACTERS", 20)
    with pytest.raises(ConfigError, match=r"has more than 20 characters: save it as JSONL"):
        read_chats(str(write(tmp_path, "x.json", json.dumps(ROWS[:1], indent=1))))


def test_a_file_of_bad_rows_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.rows import readers

    monkeypatch.setattr(readers, "MAX_BAD_START", 50)
    ledger = Ledger()
    with pytest.raises(ConfigError, match="no row of .* can be read"):
        Source(str(write(tmp_path, "x.jsonl", "{}\n" * 5000))).read(ledger)
    assert len(ledger.left_out) == 50


def test_repeated_columns_are_not_dropped(tmp_path: Path) -> None:
    ledger = Ledger()
    (chat,) = Source(str(write(tmp_path, "x.csv", "prompt,answer,answer,answer\nQ,A,B,C\n"))).read(ledger)
    assert chat.answer == "A"
    assert dict[str, Any](ledger.unused) == {"answer.1": 1, "answer.2": 1}
