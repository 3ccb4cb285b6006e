"""Settings: environment over file over defaults, and every mistake named."""

from dataclasses import fields
from pathlib import Path

import pytest

from service.settings import Settings, SettingsError, describe, read
from tests.conftest import ROOT


def test_environment_beats_the_file_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "fusion.toml"
    file.write_text('port = 4000\nmax_loras = 3\nadapters = ["a=/x"]\nstrict = true\n')
    made = read({"FUSION_CONFIG": str(file), "FUSION_PORT": "5000", "PATH": "/bin"})
    assert (made.port, made.max_loras, made.adapters, made.strict) == (5000, 3, ("a=/x",), True)
    assert made.max_lora_rank == Settings().max_lora_rank


def test_lists_are_split_by_their_own_separator() -> None:
    made = read(
        {
            "FUSION_PROFILES": "p=0.5*a + 0.5*b; q=svd(1*a + 1*b, rank=4)",
            "FUSION_ADAPTER_ROOTS": "/one:/two",
            "FUSION_ENGINE_ARGS": "--dtype float32 --chat-template 'a b'",
        }
    )
    assert made.profiles == ("p=0.5*a + 0.5*b", "q=svd(1*a + 1*b, rank=4)")
    assert made.adapter_roots == ("/one", "/two")
    assert made.engine_args == ("--dtype", "float32", "--chat-template", "a b")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FUSION_MAX_LORA", "2", "did you mean FUSION_MAX_LORAS"),
        ("FUSION_PORT", "high", "FUSION_PORT='high'"),
        ("FUSION_PORT", "0", "out of range"),
        ("FUSION_MIXED", "maybe", "auto, required, off"),
        ("FUSION_STRICT", "perhaps", "FUSION_STRICT"),
        ("FUSION_MAX_LORA_RANK", "12", "out of range"),
        ("FUSION_MAX_CPU_LORAS", "1", "out of range"),
        ("FUSION_MAX_WEIGHT", "inf", "out of range"),
        ("FUSION_MAX_WEIGHT", "nan", "out of range"),
        ("FUSION_ADAPTERS", "task", "expected NAME=VALUE"),
        ("FUSION_CONFIG", "/no/such/file.toml", "cannot be read"),
    ],
)
def test_mistakes_are_named(name: str, value: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        read({name: value})


def test_a_file_with_unknown_keys_or_broken_toml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fusion.toml"
    for text, words in (("prot = 1", "FUSION_PORT"), ("port = ", "cannot be read"), ("port = [1]", "FUSION_PORT")):
        file.write_text(text)
        with pytest.raises(SettingsError, match=words):
            read({"FUSION_CONFIG": str(file)})


def test_every_setting_is_described_and_the_readme_has_the_table() -> None:
    table = describe()
    for setting in fields(Settings):
        assert f"`FUSION_{setting.name.upper()}`" in table and setting.metadata["help"] in table
    assert table in (ROOT / "README.md").read_text(), "paste `python -m service --help` into the README"
