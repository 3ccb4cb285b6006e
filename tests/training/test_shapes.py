"""Rows as people have them: what of them is learned, shown, and named."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.training.wild import ANSWER, ASK, BAD, CALL, CALLS, READ, A, F, Q
from training.config import DataConfig
from training.errors import ConfigError
from training.rows.dataset import build_dataset
from training.rows.readers import Source, read_chats
from training.rows.shapes import Ledger, Shape


@pytest.mark.parametrize(("report", "row", "turns", "muted", "unused"), READ)
def test_a_row_is_read_and_what_is_not_used_is_named(
    report: str, row: Any, turns: list[tuple[str, str]], muted: set[int], unused: set[str]
) -> None:
    ledger = Ledger()
    chat = Shape().read(row, "x:1", ledger)
    assert list(chat.messages) == turns
    assert chat.muted == muted
    assert set(ledger.unused) == unused
    assert bool(ledger.silent) == (report == "F11")


@pytest.mark.parametrize("row", CALLS)
def test_a_function_call_is_read_from_every_form(row: Any) -> None:
    ledger = Ledger()
    chat = Shape().read(row, "x:1", ledger)
    assert list(chat.messages) == [Q, ("assistant", ""), ("tool", "7"), A]
    assert chat.extras[1] == {"tool_calls": [CALL]}
    assert chat.tools == ({"type": "function", "function": F},)
    assert not chat.muted
    assert not ledger.unused


@pytest.mark.parametrize(("report", "row", "reason"), BAD)
def test_a_bad_row_is_left_out_by_its_reason(report: str, row: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "Q", "answer": "A"}) + "\n")
    ledger = Ledger()
    (chat,) = Source(str(path)).read(ledger)
    assert chat.where == "x.jsonl:2"
    with pytest.raises(ConfigError, match=rf"^x\.jsonl:1.*{reason}"):
        read_chats(str(path))
    (left_out,) = ledger.left_out
    assert left_out.startswith("x.jsonl:1")


def write(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_left_out_are_counted_and_three_are_shown(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path, *[{"prompt": "Q", "answer": None}] * 5, {"prompt": "Q", "answer": "A"})  # F6
    report = build_dataset(DataConfig(path=path), tiny_tokenizer).report
    assert report.rows == 1
    assert len(report.left_out) == 5
    text = report.text()
    assert "5 rows cannot be read and are left out: rows.jsonl:1: the content" in text
    assert "rows.jsonl:3" in text
    assert "rows.jsonl:4" not in text
    assert "and 2 more" in text
    with pytest.raises(ConfigError, match=r"5 rows cannot be read: .*; and 2 more"):
        build_dataset(DataConfig(path=path, strict=True), tiny_tokenizer)
    with pytest.raises(ConfigError, match=r"no row of .* can be read: rows\.jsonl:1: "):
        build_dataset(DataConfig(path=write(tmp_path, {"prompt": "Q", "answer": None})), tiny_tokenizer)


def learn(tokenizer: Any, path: str) -> str:
    (row,) = build_dataset(DataConfig(path=path), tokenizer).train
    text: str = tokenizer.decode(row.ids[row.is_target])
    return text


def test_no_loss_on_turns_that_are_not_to_be_learned(tmp_path: Path, tiny_tokenizer: Any) -> None:
    wrong = {"role": "assistant", "content": "WRONG"}
    for flag in ({"weight": 0}, {"train": False}):  # F2
        path = write(tmp_path, {"messages": [*ASK, wrong | flag, *ASK, *ANSWER]})
        assert learn(tiny_tokenizer, path) == "A<|im_end|>"
    path = write(tmp_path, {"messages": [*ASK, {"role": "assistant", "content": " "}, *ASK, *ANSWER]})  # F11
    assert learn(tiny_tokenizer, path) == "A<|im_end|>"
    report = build_dataset(DataConfig(path=path), tiny_tokenizer).report
    assert "1 rows have an empty answer before the last, which is not learned: rows.jsonl:1" in report.text()
    path = write(tmp_path, {"messages": [*ASK, wrong | {"weight": 0}]}, {"messages": [*ASK, *ANSWER]})
    assert build_dataset(DataConfig(path=path), tiny_tokenizer).report.empty == ["rows.jsonl:1"]


TOOLS_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_the_template_does_not_show_is_named(tmp_path: Path, tiny_tokenizer: Any) -> None:
    thinking = {"messages": [*ASK, {**ANSWER[0], "reasoning_content": "R"}], "tools": [F]}  # F4
    path = write(tmp_path, thinking, CALLS[0])
    report = build_dataset(DataConfig(path=path), tiny_tokenizer).report
    assert report.unshown == {"reasoning_content": 1, "tools": 1}
    assert "left out by the base's chat template: 'reasoning_content' (1 rows), 'tools' (1 rows)" in report.text()
    (left_out,) = report.left_out
    assert left_out == "rows.jsonl:2: the chat template shows no tool calls: set model.template to one that does"
    showing = deepcopy(tiny_tokenizer)
    showing.chat_template = TOOLS_TEMPLATE
    data = build_dataset(DataConfig(path=path), showing)
    assert data.report.unshown == {"reasoning_content": 1, "name": 1}
    row = data.first[1]
    assert showing.decode(row.ids[row.is_target]) == '{"x": 1}<|im_end|>A<|im_end|>'


def test_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "P", "Frage": "Q", "antwort": "A", "rolle": "S", "note": "N"})  # F5

    def read(**columns: str) -> list[tuple[str, str]]:
        return list(read_chats(path, columns=columns)[0].messages)

    assert read(prompt="Frage", answer="antwort", system="rolle") == [("system", "S"), Q, A]
    assert read(answer="antwort") == [("user", "P"), A]
    assert read(prompt="frage", answer="antwort", context="note") == [("user", "Q\n\nN"), A]
    with pytest.raises(ConfigError, match="answer is 'antwrt', a column that no row of .* has: did you mean 'antwort'"):
        read(answer="antwrt")
    with pytest.raises(ConfigError, match="expected one of messages, prompt, answer"):
        DataConfig(path=path, columns={"reply": "antwort"})
    with pytest.raises(ConfigError, match="messages, or prompt and answer, not both"):
        DataConfig(path=path, columns={"messages": "a", "answer": "antwort"})
    path = write(tmp_path, {"question": "Q", "answer": "A", "context": "S"})
    assert read(system="context") == [("system", "S"), Q, A]
    path = write(tmp_path, {"messages": [*ASK, *ANSWER], "before": [["a", "b"]], "note": "N"})
    assert read(history="before") == [("user", "a"), ("assistant", "b"), Q, A]
    with pytest.raises(ConfigError, match="messages take no context"):
        read(context="note")
    labeled = write(tmp_path, {"prompt": "Q", "completion": "A", "label": False})
    assert len(read_chats(labeled, columns={"label": ""})) == 1


# (tags of the rows, indices of those left out); r24
NUMBERS = [
    ([{"label": 1}, {"label": 0}], [1]),
    ([{"label": "1.0"}, {"label": "0"}, {"label": None}], [1]),
    ([{"label": 1}, {"label": 0}, {"label": 2}], []),  # classes
    ([{"label": 0}, {"label": "sports"}], []),
    ([{"label": 1}, {"label": -1}], [1]),
    ([{"label": 1}, {"label": 0}, {"label": -1}], [2]),
    ([{"is_rejected": 1}, {"is_rejected": 0}], [0]),
    ([{"score": 1.0}, {"score": 0.0}], [1]),
    ([{"score": 0.7}, {"score": 0}, {"score": 1}], []),
    ([{"rating": 0}, {"rating": 0}], []),
    ([{"thumbs": 1}, {"thumbs": -1}], [1]),
    ([{"thumbs_up": 0}, {"thumbs_up": 1}], []),  # how many
    ([{"correct": 0}, {"correct": 1}], []),  # which choice
    ([{"label": True, "score": 0}, {"label": False, "score": 1}], [1]),
]


@pytest.mark.parametrize(("tags", "expected"), NUMBERS)
def test_numbers_reject_answers_where_the_whole_column_judges(
    tags: list[dict[str, Any]], expected: list[int], tmp_path: Path
) -> None:
    rows = [{"prompt": "Q", "completion": f"A{i}", **tag} for i, tag in enumerate(tags)] + [
        {"prompt": "Q", "completion": "plain"}
    ]
    ledger = Ledger()
    chats = Source(write(tmp_path, *rows)).read(ledger)
    answers = [row["completion"] for i, row in enumerate(rows) if i not in expected]
    assert [chat.answer for chat in chats] == answers
    assert sorted(ledger.rejected) == sorted(ledger.left_out)
    assert [row.split(":")[1] for row in sorted(ledger.rejected)] == [str(i + 1) for i in expected]
    (column, *_) = tags[0]
    assert ((column, "label") in ledger.used) != ((+ledger.unused)[column] > 0)


def test_rejected_rows_are_counted_shown_and_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [{"prompt": "Q", "completion": "A", "label": i % 2} for i in range(10)]
    path = write(tmp_path, *rows, {"prompt": "Q"})
    report = build_dataset(DataConfig(path=path), tiny_tokenizer).report
    text = report.text()
    assert "5 rows say that their answer is a bad one and are left out: rows.jsonl:1: label is 0: its answer" in text
    assert "rows.jsonl:5: label is 0: its answer is not one to learn; and 2 more" in text
    assert "1 rows cannot be read and are left out: rows.jsonl:11 has the columns" in text
    assert report.columns["label"] == "label"
    assert not report.unused
    with pytest.raises(ConfigError, match="6 rows cannot be read: .*rows.jsonl:1: label is 0"):
        build_dataset(DataConfig(path=path, strict=True), tiny_tokenizer)
    learned = build_dataset(DataConfig(path=path, columns={"label": ""}), tiny_tokenizer).report
    assert (learned.rows, learned.unused) == (10, {"label": 10})


def test_marks_are_named_as_what_may_be_meant(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [{"prompt": "Q", "completion": "A", "score": score, "label": 3} for score in (1, 4.5, 0)]
    report = build_dataset(DataConfig(path=write(tmp_path, *rows)), tiny_tokenizer).report
    assert report.notes == ["'score' may rate the answers, of which all are learned: leave out those to be avoided"]
    assert report.unused == {"score": 3, "label": 3}


def test_rows_of_another_split_and_empty_questions_are_named(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [{"prompt": "Q" * (i > 0), "completion": "A", "split": split} for i, split in enumerate(("train", "test"))]
    report = build_dataset(DataConfig(path=write(tmp_path, *rows)), tiny_tokenizer).report
    assert report.notes == ["'split' is 'test' in 1 rows, which are learned like the others: leave them out"]
    assert "1 rows have an empty question: rows.jsonl:1" in report.text()


def test_messages_of_many_chats_in_an_array_are_no_chat(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    turns = [{"message_id": i, "parent_id": None, "role": role, "text": "Q"} for i, role in enumerate(("user", "bot"))]
    path.write_text(json.dumps(turns))
    with pytest.raises(ConfigError, match="has the columns 'message_id', 'parent_id'"):
        read_chats(str(path))


def test_a_column_named_as_label_judges(tmp_path: Path) -> None:
    path = write(tmp_path, *[{"prompt": "Q", "completion": "A", "ok": ok} for ok in (0, 1, "yes", "no", "?", None)])
    ledger = Ledger()
    chats = Source(path, columns={"label": "ok"}).read(ledger)
    assert [chat.where for chat in chats] == ["rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:6"]
    assert "rows.jsonl:5: ok is '?': expected true or false, 1 or 0, chosen or rejected" in ledger.left_out
    assert len(ledger.rejected) == 2


def test_rows_with_other_flags_or_tools_are_other_data(tmp_path: Path) -> None:
    rows = [{"messages": [*ASK, *ANSWER]}, {"messages": [*ASK, {**ANSWER[0], "weight": 0}]}]
    rows += [{"messages": [*ASK, *ANSWER], "tools": [F]}]
    chats = read_chats(write(tmp_path, *rows))
    assert len({chat.serialize() for chat in chats}) == 3
