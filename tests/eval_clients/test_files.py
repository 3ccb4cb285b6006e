"""Evaluation files as people have them: a table of what was tried, each with what must come of it.

The numbers name the reports: G1 separators, G2 and G3 headers, G5 contexts, G6 versions of XSTest, G7 forms, G8 quotes.
"""

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from eval_clients.errors import DataError
from eval_clients.tasks import data
from eval_clients.tasks.benchmarks import BENCHMARKS, describe_data, guess_benchmark
from eval_clients.tasks.items import Reading

TEXT = "Say a bad word"
OTHER = "Say two, please"
HARMBENCH = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
V2 = "id_v1,id_v2,type,prompt,focus,note\nv1-1,v2-1,homonyms,Stop a clock?,,\nv1-2,v2-2,contrast_homonyms,Stop him?,,\n"
V1 = "id,type,prompt,focus,note\nv1-1,homonyms,Stop a clock?,,\nv1-2,contrast_homonyms,Stop him?,,\n"


@dataclass(frozen=True)
class File:
    """A file, how it is asked for, and its prompts."""

    content: str | bytes
    prompts: tuple[str, ...] = (TEXT, OTHER)
    name: str = "set.csv"
    task: str = "harmful_csv"
    columns: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] | None = None


READ = {
    # G1: the separator is the one all rows agree in
    "semicolons": File(f"goal;target\n{TEXT};Sure\n{OTHER};Sure, two\n", unused=("target",)),
    "tabs": File(f"goal\ttarget\n{TEXT}\tSure\n{OTHER}\tSure\n", unused=("target",)),
    "bars": File(f"goal|target\n{TEXT}|Sure\n{OTHER}|Sure\n"),
    "semicolons in quotes": File('"goal";"target"\n"Say; a";"Sure"\n', ("Say; a",)),
    "Excel's line": File(f"sep=;\ngoal;target\n{TEXT};Sure\n{OTHER};Sure\n"),
    "spaces after commas": File(f'goal, target\n{TEXT}, Sure\n"{OTHER}", Sure\n'),
    "UTF-16 of Excel": File(f"goal\ttarget\n{TEXT}\tSure\n{OTHER}\tSure\n".encode("utf-16")),
    "BOM": File(f"\ufeffgoal;target\n{TEXT};Sure\n{OTHER};Sure\n"),
    "Windows-1252": File("goal,target\nSay café’s word,Sure\n".encode("cp1252"), ("Say café’s word",)),
    "old Mac's lines": File(f'goal,target\r{TEXT},Sure\r"{OTHER}",Sure\r'),
    "gzip": File(gzip.compress(f"{TEXT}\n{OTHER}\n".encode()), name="set.csv.gz"),
    "headers of joined files": File(f"goal;target\n{TEXT};Sure\ngoal;target\n{OTHER};Sure\n"),
    "R's index": File(f'"goal","target"\n"1","{TEXT}","Sure"\n"2","{OTHER}","Sure"\n'),
    # G2: a header is told from prompts
    "prompts": File(f"prompts\n{TEXT}\n{OTHER}\n"),
    "query": File(f"query\n{OTHER}\n{TEXT}\n", (OTHER, TEXT)),
    "two words": File(f"Harmful Prompt\n{TEXT}\n{OTHER}\n"),
    "named header": File(f"anfrage\n{TEXT}\n{OTHER}\n", columns={"prompt": "anfrage"}),
    "named column": File(f"nr;anfrage\n1;{TEXT}\n2;{OTHER}\n", columns={"prompt": "Anfrage"}, unused=("nr",)),
    "numbered column": File(f"{TEXT};Sure\n{OTHER};Sure\n", columns={"prompt": "1"}),
    "a word, said to be a prompt": File(f"Hello\n{TEXT}\n", ("Hello", TEXT), columns={"prompt": "1"}),
    "a number above an index": File(f"nr;anfrage\n1;{TEXT}\n2;{OTHER}\n", columns={"prompt": "2"}),
    # G3: HEx-PHI as it is passed on
    "HEx-PHI": File(f"{TEXT}\n{OTHER}\n", name="category_1.csv", task="hexphi"),
    "HEx-PHI, header": File(f"prompt\n{TEXT}\n{OTHER}\n", name="category_1.csv", task="hexphi"),
    "HEx-PHI, index": File(f',0\n0,{TEXT}\n1,"{OTHER}"\n', name="category_1.csv", task="hexphi"),
    "HEx-PHI, bare index": File(f'0,{TEXT}\n1,"{OTHER}"\n', name="category_1.csv", task="hexphi"),
    "HEx-PHI, named": File(f',prompt\n0,{TEXT}\n1,"{OTHER}"\n', name="category_1.csv", task="hexphi"),
    "HEx-PHI, zero": File(f"0\n{TEXT}\n{OTHER}\n", name="category_1.csv", task="hexphi"),
    # G5: a context is asked with its prompt, as HarmBench does
    "HarmBench": File(
        HARMBENCH + f'{TEXT},standard,x,,,a\nSay what it says,contextual,x,context,"A text.\nOf two.",b\n',
        (TEXT, "A text.\nOf two.\n\n---\n\nSay what it says"),
        unused=("FunctionalCategory", "SemanticCategory", "Tags", "BehaviorID"),
    ),
    "context in JSON": File('{"prompt": "Say it", "context": "A"}\n', ("A\n\n---\n\nSay it",), "a.jsonl"),
    "context not wanted": File('{"prompt": "Say", "context": "A"}\n', ("Say",), "a.jsonl", columns={"context": ""}),
    "instruction and input": File('[{"instruction": "Say", "input": "A", "output": "B"}]', ("Say\n\nA",), "a.json"),
    # G6: XSTest's versions; only unsafe ones are harmful prompts
    "XSTest v2": File(V2, ("Stop a clock?", "Stop him?"), task="xstest", unused=("id_v1", "focus", "note")),
    "XSTest v1": File(V1, ("Stop a clock?", "Stop him?"), task="xstest"),
    "XSTest's unsafe": File(V2, ("Stop him?",)),
    "XSTest's types alone": File("prompt,type\nStop?,homonyms\nStop him?,contrast_homonyms\n", ("Stop him?",)),
    "harmful or not": File("prompt,label\nSay,Not harmful\nTell,Harmful\n", ("Say",), task="harmless"),
    "XSTest's safe": File(V1, ("Stop a clock?",), task="harmless"),
    # G7: forms
    "goal in JSONL": File(json.dumps({"goal": TEXT}) + "\n" + json.dumps({"goal": OTHER}), name="a.jsonl"),
    "lines with commas": File(f"{TEXT}\n{OTHER}\n"),
    "text with commas": File("Say red,green\nSay a, b; c\nSay\n", ("Say red,green", "Say a, b; c", "Say"), "a.txt"),
    "array": File(json.dumps([{"goal": TEXT}, {"goal": OTHER}], indent=1), name="a.json"),
    "array of strings": File(json.dumps([TEXT, OTHER]), name="a.json"),
    "array in one line of JSONL": File(json.dumps([{"goal": TEXT}, {"goal": OTHER}]), name="a.jsonl"),
    "rows under a key": File(json.dumps({"version": 1, "data": [{"goal": TEXT}, {"goal": OTHER}]}), name="a.json"),
    "columns": File(json.dumps({"goals": [TEXT, OTHER], "targets": ["a", "b"]}), name="a.json", unused=("targets",)),
    "pandas' JSON": File(json.dumps({"goal": {"0": TEXT, "1": OTHER}, "target": {"0": "a", "1": "b"}}), name="a.json"),
    "JSON without its suffix": File(json.dumps({"goal": TEXT}) + "\n" + json.dumps({"goal": OTHER}), name="a.txt"),
    "a turn in a list": File('{"question_id": 1, "turns": ["Say it"]}\n', ("Say it",), "a.jsonl"),
    "a chat of one turn": File('{"prompt": [{"role": "user", "content": "Say it"}]}\n', ("Say it",), "a.jsonl"),
    "lists in cells": File('turns,id\n[\'Say it\'],1\n"[""Say, two""]",2\n', ("Say it", "Say, two")),  # review
    "brackets in a prompt": File(
        "goal,target\n[INST] Say [/INST],Sure\n['a] Say,Sure\n", ("[INST] Say [/INST]", "['a] Say")
    ),
    # G8: quotes
    "a quote that encloses nothing": File(
        'goal,target\n"Say" a word,Sure\n"Say, b",Sure\n', ('"Say" a word', "Say, b")
    ),
    "the same without columns": File('"Say" a word\nSay two, or "three"\n', ('"Say" a word', 'Say two, or "three"')),
    "escaped quotes": File('goal,target\n"Say \\"a\\", b",Sure\n', ('Say "a", b',)),
    "a quote never closed": File(f'goal,target\n"Say it,Sure\n{TEXT},Sure\n', ('"Say it', TEXT)),
    # other sets as published
    "StrongREJECT": File(
        f'category,source,forbidden_prompt\na,b,{TEXT}\na,b,"{OTHER}"\n', unused=("category", "source")
    ),
    "JailbreakBench": File(
        f'Index,Goal,Target,Behavior,Category,Source\n0,{TEXT},Sure,A,B,C\n1,"{OTHER}",Sure,A,B,C\n'
    ),
    "AdvBench": File(f'goal,target\n{TEXT},Sure\n"{OTHER}",Sure\n', task="advbench"),
    "Do-Not-Answer": File(f'id,risk_area,types_of_harm,specific_harms,question\n1,a,b,c,{TEXT}\n2,a,b,c,"{OTHER}"\n'),
    "OR-Bench": File(f'prompt,category\n{TEXT},a\n"{OTHER}",a\n', task="harmless"),
    "MaliciousInstruct": File(f"{TEXT}\n{OTHER}\n", name="MaliciousInstruct.txt"),
    "a task in CSV": File(f'question;response\n{TEXT};a\n"{OTHER}";b\n', task="task"),
}


def read(file: File, folder: Path) -> tuple[list[str], list[Reading]]:
    path = folder / file.name
    path.write_bytes(file.content if isinstance(file.content, bytes) else file.content.encode())
    readings: list[Reading] = []
    samples = BENCHMARKS[file.task].read(folder if file.task == "hexphi" else path, file.columns, readings.append)
    return [str(sample.input) for sample in samples], readings


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_as_it_is_and_the_report_says_so(name: str, tmp_path: Path) -> None:
    file = READ[name]
    prompts, (reading,) = read(file, tmp_path)
    assert prompts == list(file.prompts)
    assert reading.prompts == len(prompts)
    assert reading.first == " ".join(prompts[0].split())
    if file.unused is not None:
        assert tuple(reading.unused) == file.unused


REFUSED = {
    # G1: a target would be sent along with its prompt
    "two columns, no header": (File("Say a;Sure\nSay b;Sure\n"), "2 columns and no header.*--column prompt=NUMBER"),
    "one row": (File("Say a word,Sure\n"), "2 columns and no header"),
    "spaced semicolons": (File("Say a; Sure\nSay b; Sure\n"), "2 columns and no header"),
    "rows that disagree": (File("Say a,Sure\nSay b, then c,Sure\n"), "line 2 has 3 cells where line 1 has 2"),
    "more cells than names": (File("goal,target\nSay a, then b,Sure\n"), "line 2 has 3 cells, and the header 2"),
    "more columns than names": (File("prompt\nSay a;Sure\nSay b;Sure\n"), "the header names one column"),
    "Markdown": (File("|goal|target|\n|---|---|\n|Say a|Sure|\n"), "Markdown"),
    "two separators": (File("goal,target\nSay a;Sure\nSay b;Sure\n"), "header is split by commas, and line 2 by semi"),
    # G2: a header would be asked
    "unknown name": (
        File("anfrage\nSay a word\nSay two\n"),
        "may be a header or a prompt; say --column prompt='anfrage'",
    ),
    "unknown name of two words": (File("Bad prompts\nSay a word now\nSay two words\n"), "may be a header or a prompt"),
    "unknown names": (File("nr,anfrage\n1,Say a\n2,Say b\n"), "'nr', 'anfrage': say which column"),
    "a comment above": (File("# a set\nSay a word\n"), "may be a header"),
    "a header below": (File("A set of 2026\ngoal,target\nSay,Sure\n"), "line 2 looks like the header"),
    "only targets": (File("target\nSure, here\nSure, there\n"), "no header with one of prompt.*--column prompt=NAME"),
    "no such column": (File("goal,target\na,b\n", columns={"prompt": "q"}), "no such column; it has 'goal', 'target'"),
    "a role of no use": (File("goal,target\na,b\n", columns={"answer": "target"}), "expected one of prompt, context"),
    "header alone": (File("goal,target\n"), "holds no prompts"),
    # G6
    "XSTest without labels": (File("id,type,prompt\n1,x,Say\n", task="xstest"), "line 2: .*one of XSTest's types"),
    "a label that says nothing": (File("goal,x\na,1\n", columns={"label": "x"}), "the label is '1'; expected safe"),
    # G7
    "JSON of other keys": (
        File('{"frage": "Say"}\n', name="a.jsonl"),
        "expected an object with prompt; it has 'frage'",
    ),
    "JSON of two sets": (File('{"a": [{"goal": "x"}], "b": [{"goal": "y"}]}', name="a.json"), "has 'a', 'b'|'a', 'b'"),
    "a key twice": (File('{"goal": "a", "goal": "b"}\n', name="a.jsonl"), "line 1 .* 'goal' occurs twice"),
    "a number": (File('{"goal": "a"}\n{"goal": 3}\n', name="a.jsonl"), "line 2: `goal` is 3"),
    # no data
    "LFS": (File("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n"), "git lfs pull"),
    "a page": (File("<!DOCTYPE html>\n<html></html>"), "web page"),
    "an error": (File("404: Not Found"), "failed download"),
    "a gated set": (File("Access to dataset a/b is restricted. Please log in."), "failed download"),
    "a workbook": (File(b"PK\x03\x04..."), "Excel"),
    "NUL bytes": (File(b"a\0b"), "NUL"),
    "Cyrillic": (File("goal,target\nСкажи слово,Да\n".encode("cp1251")), "not valid UTF-8.*save it as UTF-8"),
    "Chinese": (File("goal,target\n说一个词,好\n".encode("gbk")), "not valid UTF-8"),
    "Japanese": (File("goal,target\nこんにちは,はい\n".encode("shift-jis")), "not valid UTF-8"),
    "half a gzip": (File(gzip.compress(b"Say it" * 99)[:30], name="a.csv.gz"), "damaged gzip"),
    "two turns": (File('{"id": 1, "turns": ["Say", "Tell"]}\n', name="a.jsonl"), "`turns` has 2 turns; expected one"),
    "two turns in a cell": (File("turns,id\n\"['Say', 'Tell']\",1\n"), "`turns` has 2 turns; expected one"),
    "other labels": (
        File("prompt,label\nSay a,bad\nSay b,safe\n"),
        "which has 'bad', 'safe'; --column label= asks all",
    ),
    "prose with commas": (File("Say a, now\nSay b, now\nSay c, now\n"), "if each line is one prompt, put it in double"),
    "an answer of null": (File('{"prompt": "Say", "answer": null}\n', name="a.jsonl", task="task"), "no answer"),
    "no answer": (File("prompt,answer\nSay,\n", task="task"), "line 2: no answer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    file, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        read(file, tmp_path)


def test_parquet_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"goal": [TEXT], "target": ["Sure"]}), tmp_path / "a.parquet")
    assert [sample.input for sample in data.read_harmful(tmp_path / "a.parquet")] == [TEXT]


def test_samples_keep_the_ids_and_categories_that_results_on_disk_have(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("id,goal,category\n7,Say a,x\n8,,x\n9,Say b,y\n")
    first, second = data.read_harmful(tmp_path / "set.csv")
    assert [(s.id, s.metadata["category"]) for s in (first, second)] == [("set-1", "set"), ("set-2", "set")]  # type: ignore[index]  # set by every task
    named, _ = data.read_harmful(tmp_path / "set.csv", {"category": "category"})
    assert named.metadata is not None
    assert named.metadata["category"] == "x"


def test_a_report_names_what_was_left_out_and_what_was_guessed(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_bytes('goal;kind\nSay café;harmful\n;harmful\nSay b;harmless\n"Say" c;\n'.encode("cp1252"))
    (reading,) = describe_data("harmful_csv", str(path))
    text = str(reading)
    assert text.startswith(f"{path}: 2 prompts (columns split by semicolons, Windows-1252")
    for part in (
        "first: Say café",
        "prompt from 'goal'",
        "without a prompt: 1",
        "kind 'harmless': 1",
        "line 5: a quote",
    ):
        assert part in text
    assert reading.to_json()["columns"] == {"prompt": "goal", "label": "kind"}


def test_a_comma_that_may_cut_a_prompt_is_named(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("prompt,category\nSay a word,x\nSay two, please\n")
    (reading,) = describe_data("harmful_csv", str(tmp_path / "set.csv"))
    assert any("line 3: a cell begins with a space" in note for note in reading.notes)


def test_a_set_is_recognized_by_its_layout(tmp_path: Path) -> None:
    for name, content in {"x.csv": V2, "a.csv": "goal\nSay a word\n", "mt/question.jsonl": "", "h/a": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    guesses = [guess_benchmark(tmp_path / name) for name in ("x.csv", "a.csv", "mt", "h")]
    assert guesses == ["xstest", "harmful_csv", "mt_bench", "hexphi"]


def test_a_long_file_is_read_in_linear_time(tmp_path: Path) -> None:
    for name, row in {"pairs": '"a""b\n', "escapes": '"\\a\n', "open": '"' + "x" * 50 + "\n"}.items():
        (tmp_path / name).write_text("goal,target\n" + row * 20000)
        assert len(data.read_harmful(tmp_path / name)) == 20000
