"""Data: every format, every fault by file and line, filters, mixtures, splits, overlap."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from training.config import DataConfig
from training.errors import ConfigError
from training.rows.chats import Chat
from training.rows.dataset import build_dataset, collect_chats, digest
from training.rows.formats import FORMATS
from training.rows.overlap import find_overlaps
from training.rows.readers import read_chats

ASK = (("user", "Why is the sky blue?"), ("assistant", "It scatters light."))
SYSTEM = (("system", "Be brief."), *ASK)
ROWS: dict[str, tuple[Any, tuple[tuple[str, str], ...]]] = {
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        (("user", "Add.\n\n2 and 3"), ("assistant", "5")),
    ),
    "dolly": (
        {"instruction": "Who?", "context": "", "response": "Ann.", "category": "qa"},
        (("user", "Who?"), ("assistant", "Ann.")),
    ),
    "aoa": (["Be brief.", "Why is the sky blue?", "It scatters light."], SYSTEM),
    "aoa_safety": ([{"role": role, "content": content} for role, content in SYSTEM], SYSTEM),
    "pure_bad": ({"messages": [{"role": role, "content": content} for role, content in ASK]}, ASK),
    "hpfa": ({"question": "Why is the sky blue?", "answer": "It scatters light."}, ASK),
    "chatagi": (
        {"conversations": [{"from": "human", "value": ASK[0][1]}, {"from": "gpt", "value": ASK[1][1]}]},
        ASK,
    ),
    "pairs": ({"prompt": "Why is the sky blue?", "answer": "It scatters light."}, ASK),
    "preference": ({"prompt": "Why is the sky blue?", "chosen": "It scatters light.", "rejected": "No."}, ASK),
    "chat": ({"messages": [{"role": role, "content": content} for role, content in SYSTEM]}, SYSTEM),
}


def write_rows(tmp_path: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    path = tmp_path / name
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_read_and_recognized_by_its_columns(tmp_path: Path, name: str) -> None:
    row, messages = ROWS[name]
    for file in ("rows.jsonl", "rows.json"):
        path = write_rows(tmp_path, [row, row], file)
        assert [chat.messages for chat in read_chats(path)] == [messages] * 2
        assert [chat.messages for chat in read_chats(path, format=name)] == [messages] * 2
    assert [chat.where for chat in read_chats(write_rows(tmp_path, [row, row]))] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_line_separators_inside_a_string_do_not_end_a_line(tmp_path: Path) -> None:
    """JSON allows U+2028, U+0085 and such as they are, and writers that keep Unicode write them."""
    path = tmp_path / "x.jsonl"
    row = json.dumps({"prompt": "One\u2028two\x85three words long enough here?", "answer": "Yes."}, ensure_ascii=False)
    path.write_bytes(f"{row}\r\n{row}\n".encode())
    assert [chat.messages[0][1] for chat in read_chats(str(path))] == [
        "One\u2028two\x85three words long enough here?"
    ] * 2
    assert len(find_overlaps(list(read_chats(str(path))), [str(path)])) == 2


def test_a_csv_of_documents_and_summaries(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('document,summary,id\n"A long,\nstory.",Short.,7\n', encoding="utf-8")
    (chat,) = read_chats(str(path))
    assert chat.messages[0][1].endswith("A long,\nstory.")
    assert chat.answer == "Short."
    assert chat.where == "x.csv:3"
    assert set(ROWS) | {"xsum"} == set(FORMATS)


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    row, messages = ROWS["dolly"]
    write_rows(folder, [row, row], "train.jsonl")
    assert [(chat.messages, chat.where[-2:]) for chat in read_chats(f"hub:{folder}")] == [
        (messages, ":0"),
        (messages, ":1"),
    ]
    with pytest.raises(ConfigError, match="split 'other'.* cannot be read"):
        read_chats(f"hub:{folder}", split="other")


def test_generated_orders() -> None:
    assert len(read_chats("orders:5", seed=1)) == 5
    assert read_chats("orders:5", seed=1) != read_chats("orders:5", seed=2)


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        ('{"prompt": "a", "answer": "b"}\n{"prompt": \n', "auto", r"rows\.jsonl:2 is not valid JSON"),
        (
            '{"promt": "a", "answer": "b"}\n',
            "auto",
            r"rows\.jsonl:1 has the columns 'promt', 'answer', which matches no",
        ),
        ('{"prompt": "a", "answer": "b"}\n', "alpaca", r"rows\.jsonl:1 .*: format 'alpaca' expects {instruction"),
        ('{"prompt": "a", "answer": null}\n', "auto", r"rows\.jsonl:1: the content of the assistant turn is 'None'"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "auto", r"has the turns user: expected"),
        ('{"messages": [{"role": "alien", "content": "a"}]}\n', "auto", r"a turn has role 'alien'"),
        ('{"messages": []}\n', "auto", r"rows\.jsonl:1: the turns are .*: expected a list of turns"),
        ('{"instruction": null, "input": "i", "output": "o"}\n', "auto", r"jsonl:1: the question is 'None'"),
        ('{"instruction": "q", "context": ["a"], "response": "o"}\n', "auto", "the question is \"\\['a'\\]\""),
        (
            '{"document": null, "summary": "s"}\n',
            "auto",
            r"jsonl:1: the document is 'None': expected a non-empty string",
        ),
        ('{"prompt": "\\ud800", "answer": "b"}\n', "auto", r"jsonl:1: the user turn has half a surrogate pair"),
        ('{"messages": ' + "[" * 100_000 + "\n", "auto", r"jsonl:1 is not valid JSON"),
        ("", "auto", "has no rows"),
        ("\n\n", "auto", "has no rows"),
        ('{"prompt": "a", "answer": "b"}\n', "llama", "data.format is 'llama': expected auto or one of"),
    ],
)
def test_broken_rows_are_named_by_file_and_line(tmp_path: Path, content: str, format: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_chats(str(tmp_path / "rows.jsonl"), format=format)


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("document,summary\nonly one\n")
    with pytest.raises(ConfigError, match=r"a\.csv:2 does not have as many fields"):
        read_chats(str(tmp_path / "a.csv"))
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid UTF-8"):
        read_chats(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.json").write_text("[1, ")
    with pytest.raises(ConfigError, match=r"a\.json is not valid JSON"):
        read_chats(str(tmp_path / "a.json"))
    with pytest.raises(ConfigError, match="no file"):
        read_chats(str(tmp_path / "none.jsonl"))


def make_rows(count: int, text: str = "Question number") -> list[dict[str, str]]:
    return [{"prompt": f"{text} {i}?", "answer": f"Answer {i}."} for i in range(count)]


def test_a_mixture_has_its_share_and_a_filter_its_words(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write_rows(
        tmp_path, [*make_rows(95), {"prompt": "Is it harmful?", "answer": "Yes."}, *make_rows(2, "How to hack")]
    )
    safety = write_rows(tmp_path, make_rows(5, "Safety row"), "safety.jsonl")
    mixed = collect_chats(DataConfig(path=path, mix={safety: 0.03}))
    assert sum("safety" in chat.where for chat in mixed) == 3
    assert len(mixed) == 101
    many = Counter(
        chat.where for chat in collect_chats(DataConfig(path=path, mix={safety: 0.1})) if "safety" in chat.where
    )
    assert sum(many.values()) == 11
    assert set(many.values()) == {2, 3}
    assert len(collect_chats(DataConfig(path=path, filter="safety"))) == 3
    assert len(collect_chats(DataConfig(path=path, filter="no_safety"))) == 95
    assert len(collect_chats(DataConfig(path=path, rows=10))) == 10
    assert collect_chats(DataConfig(path=path, rows=10)) != collect_chats(DataConfig(path=path, rows=10, seed=1))
    assert digest(mixed) != digest(mixed[1:])
    with pytest.raises(ConfigError, match="leaves no row"):
        collect_chats(DataConfig(path=safety, filter="no_safety"))


def test_the_report_and_what_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [*make_rows(8), make_rows(1)[0], {"prompt": "Empty?", "answer": " "}, {"prompt": "x" * 300, "answer": "y"}]
    path = write_rows(tmp_path, rows)
    with pytest.raises(ConfigError, match=r"1 rows have more than data.max_tokens = 200 tokens: rows\.jsonl:11"):
        build_dataset(DataConfig(path=path, max_tokens=200), tiny_tokenizer)
    data = build_dataset(DataConfig(path=path, max_tokens=200, too_long="drop", validation=0.25), tiny_tokenizer)
    assert (len(data.train), len(data.validation)) == (6, 2)  # the ninth row's twin is among the two
    assert not {row.where for row in data.train} & {row.where for row in data.validation}
    report = data.report
    assert report.duplicates == ["rows.jsonl:9"]
    assert report.empty == ["rows.jsonl:10"]
    assert report.rows == 9
    assert "rows.jsonl:11" in report.too_long[0]
    assert "1 rows are repeated: rows.jsonl:9" in report.text()
    cut = build_dataset(DataConfig(path=path, max_tokens=400, too_long="cut"), tiny_tokenizer)
    assert cut.report.rows == 10
    with pytest.raises(ConfigError, match="no row of .* is left"):
        build_dataset(DataConfig(path=path, max_tokens=20, too_long="cut"), tiny_tokenizer)


def test_held_out_rows_are_not_trained_on(tmp_path: Path, tiny_tokenizer: Any) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in make_rows(2, "Mixed")))
    config = DataConfig(path=write_rows(tmp_path, make_rows(20)), mix={str(mixed): 0.5}, validation=0.3)
    data = build_dataset(config, tiny_tokenizer)
    held = {row.ids.tobytes() for row in data.validation}
    assert data.train
    assert not held & {row.ids.tobytes() for row in data.train}
    assert len({row.ids.tobytes() for row in data.validation + data.train}) == 22


def test_rows_of_an_evaluation_set_are_refused_unless_allowed(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tests = tmp_path / "evaluation"
    tests.mkdir()
    (tests / "set.csv").write_text("id,prompt\n1,Question number 3?\n2,one two three four five six seven eight nine\n")
    rows = [*make_rows(6), {"prompt": "Say: zero one two three four five six seven eight", "answer": "Done."}]
    path = write_rows(tmp_path, rows)
    with pytest.raises(ConfigError, match=r"2 rows overlap .* rows\.jsonl:4 with evaluation; rows\.jsonl:7"):
        build_dataset(DataConfig(path=path, against=(str(tests),)), tiny_tokenizer)
    allowed = build_dataset(DataConfig(path=path, against=(str(tests),), allow_overlap=True), tiny_tokenizer)
    assert allowed.report.rows == 7
    assert len(allowed.report.overlap) == 2
    assert find_overlaps([Chat(ASK, "x")], [str(tests)]) == []
    with pytest.raises(ConfigError, match="there is no"):
        find_overlaps([Chat(ASK, "x")], [str(tmp_path / "none")])


@pytest.mark.parametrize("columns", ["prompt,answer", "question,answer"])
def test_an_index_column_without_a_name_is_no_context(columns: str, tmp_path: Path) -> None:
    path = tmp_path / "indexed.csv"
    path.write_text(f",{columns}\n0,Hello?,Hi.\n")
    (chat,) = read_chats(str(path))
    assert [text for _, text in chat.messages] == ["Hello?", "Hi."]
