"""Settings: environment over file over defaults, and every mistake named."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from service.__main__ import main
from service.setting_tables import describe, describe_json
from service.settings import Settings, SettingsError, read_settings
from tests.conftest import BASE_NAME


def test_environment_beats_the_file_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "fusion.toml"
    file.write_text('port = 4000\nmax_loras = 3\nadapters = ["a=/x"]\nstrict = true\n')
    settings = read_settings({"FUSION_CONFIG": str(file), "FUSION_PORT": "5000", "PATH": "/bin"})
    assert (settings.port, settings.max_loras, settings.adapters, settings.strict) == (5000, 3, ("a=/x",), True)
    assert settings.max_lora_rank == Settings().max_lora_rank


@pytest.mark.parametrize(
    ("base", "name"),
    [("/models/llama", "llama"), ("./llama/", "llama"), ("org/llama", "org/llama"), (Settings().base, BASE_NAME)],
)
def test_a_base_has_the_name_of_its_folder_or_on_the_hub(base: str, name: str) -> None:
    assert read_settings({"FUSION_BASE": base}).base_name == name
    assert read_settings({"FUSION_BASE": base, "FUSION_BASE_NAME": "other"}).base_name == "other"


def test_lists_are_split_by_their_own_separator() -> None:
    settings = read_settings(
        {
            "FUSION_PROFILES": "p=0.5*a + 0.5*b; q=svd(1*a + 1*b, rank=4)",
            "FUSION_ADAPTER_ROOTS": "/one:/two",
            "FUSION_ENGINE_ARGS": "--dtype float32 --chat-template 'a b' --served-model-name ''",
        }
    )
    assert settings.profiles == ("p=0.5*a + 0.5*b", "q=svd(1*a + 1*b, rank=4)")
    assert settings.adapter_roots == ("/one", "/two")
    assert settings.engine_args == ("--dtype", "float32", "--chat-template", "a b", "--served-model-name", "")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FUSION_MAX_LORA", "2", "FUSION_MAX_LORA is not a setting; did you mean 'FUSION_MAX_LORAS'?"),
        ("FUSION_XYZ", "2", "FUSION_XYZ is not a setting; `lora-fusion settings` lists all settings"),
        ("FUSION_PORT", "high", "FUSION_PORT='high': expected an integer"),
        ("FUSION_PORT", "0", "FUSION_PORT=0: expected 1 to 65535"),
        ("FUSION_MIXED", "maybe", "FUSION_MIXED='maybe': expected one of auto, required, off"),
        ("FUSION_STRICT", "perhaps", "FUSION_STRICT='perhaps': expected true or false"),
        ("FUSION_MAX_LORA_RANK", "12", "FUSION_MAX_LORA_RANK=12: expected one of 1, 8, 16, 32, 64, 128, 256, 320, 512"),
        ("FUSION_MAX_CPU_LORAS", "1", "FUSION_MAX_CPU_LORAS=1: expected 3 or more"),
        ("FUSION_MAX_WEIGHT", "inf", "FUSION_MAX_WEIGHT=inf: expected a positive finite number"),
        ("FUSION_MAX_WEIGHT", "nan", "FUSION_MAX_WEIGHT=nan: expected a positive finite number"),
        ("FUSION_ADAPTERS", "task", "FUSION_ADAPTERS has 'task': expected NAME=VALUE"),
        ("FUSION_CONFIG", "/no/such/file.toml", "FUSION_CONFIG='/no/such/file.toml' cannot be read"),
    ],
)
def test_a_mistake_is_named_with_what_is_expected(name: str, value: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({name: value})
    assert words in str(caught.value)


def test_a_file_with_unknown_keys_or_broken_toml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fusion.toml"
    for text, words in (
        ("prot = 1", "FUSION_PORT"),
        ("engine_args = '\"x'", "FUSION_ENGINE_ARGS=...: expected flags as on a command line, quotes closed"),
        ("port = ", "cannot be read"),
        ("port = [1]", "FUSION_PORT=\\[1\\]: expected an integer"),
        ("port = 30.5", "FUSION_PORT=30.5: expected an integer"),
        ("adapters = 3", "FUSION_ADAPTERS=3: expected a list"),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError, match=words):
            read_settings({"FUSION_CONFIG": str(file)})


def test_every_setting_is_described() -> None:
    table = describe()
    for setting in fields(Settings):
        assert f"`FUSION_{setting.name.upper()}`" in table
        assert setting.metadata["help"] in table


def test_the_defaults_in_the_json_form_read_back_as_the_defaults() -> None:
    described = json.loads(describe_json())
    assert [setting["name"] for setting in described] == [setting.name for setting in fields(Settings)]
    assert read_settings({setting["variable"]: setting["default"] for setting in described}) == Settings()
    assert {setting["type"] for setting in described} == {
        "string", "integer", "number", "boolean", "path", "list", "auto | required | off", "shapes | name",
        "text | json",
    }  # fmt: skip


@pytest.mark.parametrize("args", [["--port", "1"], ["serve"]])
def test_arguments_are_refused_in_favor_of_variables(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert f"error: unknown argument {args[0]!r}" in capsys.readouterr().err


def test_help_is_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert describe() in capsys.readouterr().out


def test_an_invalid_setting_ends_the_command_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSION_PORT", "abc")
    assert main([]) == 2
    assert capsys.readouterr().err == "error: FUSION_PORT='abc': expected an integer\n"
