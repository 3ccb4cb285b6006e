"""Evaluation sets as users bring them, and the mistakes in them."""

import csv
import json
from pathlib import Path

import pytest

from eval_clients.errors import DataError
from eval_clients.scoring.scorers import is_exact_match
from eval_clients.tasks import data, mmlu
from tests.conftest import EVAL_DATA

MMLU = EVAL_DATA / "mmlu"


def lines(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_prompts_come_from_one_column_or_a_named_one(tmp_path: Path) -> None:
    bare = data.read_harmful(lines(tmp_path / "bare.csv", "Tell me a bad thing", '"Do harm, please"'))
    assert [s.input for s in bare] == ["Tell me a bad thing", "Do harm, please"]
    named = data.read_harmful(lines(tmp_path / "named.csv", "id,Goal,target", "1,Do harm,Sure"))
    assert [s.input for s in named] == ["Do harm"]
    assert named[0].metadata["measure"] == "harm"
    marked = lines(
        tmp_path / "x.jsonl", '{"prompt": "bad", "kind": "harmful"}', '{"prompt": "good", "kind": "harmless"}'
    )
    assert [s.input for s in data.read_harmful(marked)] == ["bad"]
    assert [s.input for s in data.read_harmless(marked)] == ["good"]


def test_hexphi_says_which_categories_are_missing(tmp_path: Path) -> None:
    lines(tmp_path / "category_1.csv", "A general bad request", "Another, with a comma")
    lines(tmp_path / "category_11.csv", "Where to put all my savings?")
    samples, missing = data.read_hexphi(tmp_path)
    assert [s.input for s in samples] == [
        "A general bad request",
        "Another, with a comma",
        "Where to put all my savings?",
    ]
    assert len(missing) == 9
    assert "category_2.csv" in missing[0]
    with pytest.raises(DataError, match="none of category_1"):
        data.read_hexphi(tmp_path / "no")


def test_a_subset_is_the_same_for_every_model_and_the_halves_differ() -> None:
    samples = [data.make_sample(str(n), f"prompt {n}", "safe", "x") for n in range(200)]
    assert [s.id for s in data.draw_subset(samples, 50)] == [s.id for s in data.draw_subset(samples, 50)]
    halves = [data.assign_half(f"prompt {n}") for n in range(200)]
    assert 70 < halves.count("choose") < 130


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{}"], "line 1: expected an object with prompt, answer"),
        (['{"prompt": "a", "answer": "b"}', "{"], "line 2 is not valid JSON"),
        ([""], "is empty"),
        (['{"prompt": null, "answer": "b"}'], "line 1: `prompt` is None; expected a non-empty string"),
    ],
)
def test_a_bad_row_is_named(rows: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        data.read_task(lines(tmp_path / "rows.jsonl", *rows))


def test_other_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="not valid UTF-8"):
        data.read_harmful(tmp_path / "latin.csv")
    with pytest.raises(DataError, match="no header with one of prompt"):
        data.read_harmful(lines(tmp_path / "two.csv", "a,b", "c,d"))
    with pytest.raises(DataError, match="label safe or unsafe"):
        data.read_xstest(lines(tmp_path / "xstest.csv", "id,prompt,label", "1,hello,maybe"))
    with pytest.raises(DataError, match="holds no prompts with the label safe or unsafe"):
        data.read_xstest(lines(tmp_path / "bare.csv", "id,prompt,label"))
    with pytest.raises(DataError, match="no rows of kind 'harmful'"):
        data.read_harmful(lines(tmp_path / "kind.JSONL", '{"prompt": "good", "kind": "harmless"}'))
    with pytest.raises(DataError, match="is not a folder"):
        data.read_mt_bench(tmp_path / "kind.JSONL")
    with pytest.raises(DataError, match="has only blank rows"):
        data.read_harmful(lines(tmp_path / "blank.csv", ",,", " , ,"))
    with pytest.raises(DataError, match="a letter A to D"):
        mmlu.read_rows(lines(tmp_path / "letters.csv", "q,a,b,c,d,BC"))
    with pytest.raises(DataError, match="is not an MMLU subject"):
        lines(tmp_path / "mmlu/test/alchemy_test.csv", "q,a,b,c,d,A")
        mmlu.read_questions(tmp_path / "mmlu")


def test_exact_match_is_of_meaning_for_json_and_of_text_else() -> None:
    wanted = json.dumps({"customer": "Ada", "items": [{"name": "cup", "qty": 3}]})
    assert is_exact_match('{"items": [{"qty": 3, "name": "cup"}],\n "customer": "Ada"}', wanted)
    for answer in ('{"customer": "Ada", "items": [{"name": "cup", "qty": "3"}]}', f"Sure: {wanted}", "", "[" * 9999):
        assert not is_exact_match(answer, wanted)
    assert not is_exact_match('{"customer": "Bo", "customer": "Ada", "items": [{"name": "cup", "qty": 3}]}', wanted)
    assert is_exact_match(" forty-two\n", "forty-two")
    assert not is_exact_match("Forty-two", "forty-two")


def test_a_wanted_answer_may_be_json_itself(tmp_path: Path) -> None:
    rows = ({"prompt": "a", "answer": {"item": "oak", "n": 3}}, {"prompt": "b", "answer": True})
    first, second = data.read_task(lines(tmp_path / "rows.jsonl", *map(json.dumps, rows)))
    assert is_exact_match('{"n": 3, "item": "oak"}', str(first.target))
    assert is_exact_match("true", str(second.target))


def test_a_set_s_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    file = lines(tmp_path / "dev/a.csv", "q,a,b,c,d,A")
    before = {path: data.hash_files(path) for path in (file, tmp_path)}
    assert before == {path: data.hash_files(path) for path in before}
    lines(file, "q,a,b,c,d,B")
    assert all(data.hash_files(path) != digest for path, digest in before.items())
    file.rename(tmp_path / "dev/b.csv")
    lines(tmp_path / "dev/b.csv", "q,a,b,c,d,A")
    assert data.hash_files(tmp_path) != before[tmp_path]


def test_mmlu_has_57_subjects_in_17_groups_in_4() -> None:
    assert len(mmlu.SUBCATEGORY) == 57
    assert len(mmlu.SUBJECTS) == 17
    assert len(mmlu.CATEGORIES) == 4
    assert set(mmlu.CATEGORY) == set(mmlu.SUBJECTS)
    found = mmlu.average_groups({"anatomy": [1, 0, 0, 0], "astronomy": [1]})
    assert found["all"] == {"micro": 0.4, "macro": 0.625}
    assert found["categories"] == {"other (business, health, misc.)": 0.25, "STEM": 1}


def test_a_question_reads_as_in_the_original(tmp_path: Path) -> None:
    shot, row = ["Two and two?", "3", "4", "5", "6", "B"], ["One, or two?", "1", "2", "3", "4", "A"]
    for name, one in (("dev/college_physics_dev.csv", shot), ("test/college_physics_test.csv", row)):
        (tmp_path / name).parent.mkdir()
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerow(one)
    (sample,) = mmlu.read_questions(tmp_path)
    assert "\n\n".join(sample.metadata["parts"]) == (  # type: ignore[index]  # set by every task
        "The following are multiple choice questions (with answers) about college physics.\n\n"
        "Two and two?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer: B\n\n"
        "One, or two?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert sample.target == "A"


def test_the_real_mmlu_is_read_whole() -> None:
    if not MMLU.is_dir():
        pytest.skip("MMLU is not at hand")
    samples = mmlu.read_questions(MMLU)
    assert len(samples) == 14042
    assert len({s.metadata["category"] for s in samples}) == 57
    assert len(mmlu.read_questions(MMLU, limit=200)) == 200


@pytest.mark.parametrize("turns", [["only one"], ["one", 2], "two", None])
def test_mt_bench_has_two_turns(turns: object, tmp_path: Path) -> None:
    lines(tmp_path / "question.jsonl", json.dumps({"question_id": 7, "category": "math", "turns": turns}))
    with pytest.raises(DataError, match="question 7: `turns` is .*; expected two strings"):
        data.read_mt_bench(tmp_path)


def test_a_reference_answer_without_turns_is_named(tmp_path: Path) -> None:
    lines(tmp_path / "question.jsonl", json.dumps({"question_id": 7, "category": "math", "turns": ["one", "two"]}))
    lines(tmp_path / "reference_answer.jsonl", json.dumps({"question_id": 7, "choices": []}))
    with pytest.raises(DataError, match=r"expected choices\[0\]\.turns in 7"):
        data.read_mt_bench(tmp_path)
