"""The algebra on folders of stored adapters: what it reads, and how often."""

import shutil
from pathlib import Path

import pytest

from adapters import LoraAdapter, load, save
from adapters.files import write_checksums
from service import fuser
from service.fuser import Fuser, SourceError
from tests.adapters import samples


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two stored adapters, by digest."""
    entries = {}
    for seed in (1, 2):
        adapter = samples.adapter(seed)
        entry = entries[adapter.digest] = tmp_path / adapter.digest
        save(adapter, entry / "adapter")
        write_checksums(entry)
    return entries


def test_an_adapter_is_read_again_when_it_was_written_to(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[Path]()

    def count(path: Path) -> LoraAdapter:
        read.append(path)
        return load(path)

    monkeypatch.setattr(fuser, "load", count)
    first, second = folders
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Fuser(64).write_stack(folders, [first, second], tmp_path / name)
    assert len(read) == 2
    stacks = [load(tmp_path / name / "adapter").digest for name in ("a", "b")]
    assert stacks[0] == stacks[1]

    shutil.copyfile(
        folders[second] / "adapter/adapter_model.safetensors", folders[first] / "adapter/adapter_model.safetensors"
    )
    with pytest.raises(SourceError) as error:
        Fuser(64).write_stack(folders, [first, second], tmp_path / "a")
    assert error.value.digest == first
    shutil.rmtree(folders[second])
    with pytest.raises(SourceError):
        Fuser(64).write_stack(folders, [second, first], tmp_path / "a")
