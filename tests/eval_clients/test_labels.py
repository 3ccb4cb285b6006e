"""More files as people have them (r24): columns that say which prompts are harmful, and lists of prompts."""

import json
from pathlib import Path

import pytest

from eval_clients.errors import DataError
from tests.eval_clients.test_files import OTHER, TEXT, File, read

BOTH = [TEXT, OTHER]


def rows(column: str, first: object, second: object) -> str:
    cells = zip(BOTH, (first, second), strict=True)
    return json.dumps([{"prompt": prompt, column: value} for prompt, value in cells])


LABELED = {
    "WildGuard": rows("prompt_harm_label", "harmful", "unharmful"),
    "ToxicChat": rows("toxicity", 1, 0),
    "is_harmful": rows("is_harmful", True, False),
    "Harmful": rows("Harmful", "yes", "no"),
    "isSafe": rows("isSafe", "False", "True"),
    "unsafe": rows("unsafe", 1.0, 0.0),
    "safety": rows("safety", "unsafe", "safe"),
    "benign": rows("benign", 0, 1),
}


@pytest.mark.parametrize("name", LABELED)
def test_only_prompts_of_the_kind_are_asked(name: str, tmp_path: Path) -> None:
    for task, wanted in (("harmful_csv", TEXT), ("harmless", OTHER)):
        prompts, (reading,) = read(File(LABELED[name], name="a.json", task=task), tmp_path)
        assert prompts == [wanted]
        assert any(note.startswith("left out of ") for note in reading.notes)


NOTED = {
    "a label of numbers": (File(rows("label", 1, 0), name="a.json"), "'label' says neither safe nor unsafe, but '1'"),
    "a label of truth": (File(f'prompt,label\n{TEXT},True\n"{OTHER}",False\n'), "'label' says neither safe nor"),
    "a share": (File(rows("toxicity", 0.9, 0.1), name="a.json"), "'toxicity' says neither safe nor unsafe, but '0.9'"),
    "numbers": (File(f"1. {TEXT}\n2. {OTHER}\n", name="a.txt"), "the numbers before the prompts are left out"),
    "numbers from 0": (File(f"0) {TEXT}\n1) {OTHER}\n", name="a.txt"), "the numbers before the prompts are left"),
    "bullets": (File(f"- {TEXT}\n- {OTHER}\n", name="a.txt"), "the bullets before the prompts are left out"),
    "other numbers": (File("2. Say a\n4. Say b\n", ("2. Say a", "4. Say b"), "a.txt"), "no header: each line is"),
    "one number": (File("1. Say a\nSay b\n", ("1. Say a", "Say b"), "a.txt"), "no header: each line is a prompt"),
    "prompts twice": (File(f"prompt\n{TEXT}\n{TEXT}\n", (TEXT, TEXT)), "duplicates, asked again: 1"),
    "a place": (File("prompt\nSay {word}\nSay\n", ("Say {word}", "Say")), "such as '{word}': 1"),
    "another place": (File("prompt\nSay [INSERT WORD HERE]\n", ("Say [INSERT WORD HERE]",)), "'[INSERT WORD HERE]': 1"),
    "no place": (File('prompt\n"Say {""a"": 1}, [a]"\n', ('Say {"a": 1}, [a]',)), ""),
    "an empty column at the end": (File(f',prompt,\n0,{TEXT},\n1,"{OTHER}",\n'), ""),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_was_made_of_it_is_said(name: str, tmp_path: Path) -> None:
    file, part = NOTED[name]
    prompts, (reading,) = read(file, tmp_path)
    assert prompts == list(file.prompts)
    assert part in "; ".join(reading.notes)


def test_a_file_of_another_language_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is YAML; expected CSV, JSON"):
        read(File(f"- prompt: {TEXT}\n", name="a.yaml"), tmp_path)
