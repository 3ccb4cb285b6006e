"""What surrounds the engine at start: the data folder, what ships, groups, the door, and a start that fails."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from adapters import AdapterError
from adapters.files import adapter_path, shipped, shipped_adapter
from service import data_folder
from service.data_folder import hold_data_folder, scratch_folder
from service.groups import declared_groups, warn_of_idle_groups
from service.records import AdapterRecord
from service.registry import Registry
from service.settings import Settings
from service.startup import _engine_options, _prove, open_registry
from tests.conftest import BASE, ROOT
from tests.service.conftest import adapter_info, fill


def test_a_data_folder_has_one_server_and_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_folder, "LOCK_WAIT_S", 0)
    data = tmp_path / "data"
    (data / "upload-killed").mkdir(parents=True)
    (data / "adapters").mkdir()
    with hold_data_folder(data):
        assert {path.name for path in data.iterdir()} == {"lock", "adapters"}
        with pytest.raises(RuntimeError, match="another server uses the data folder"), hold_data_folder(data):
            pass
    with hold_data_folder(data):
        pass
    with hold_data_folder(tmp_path / "new"):
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700  # it has system prompts, and hashes of keys


@pytest.mark.parametrize("prefix", data_folder.SCRATCH_PREFIXES)
def test_a_scratch_folder_ends_with_its_block(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(KeyError), scratch_folder(tmp_path, prefix) as folder:
        (folder / "file").touch()
        assert folder.match(f"{prefix}-*")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_shipped_adapters_are_found_in_a_checkout() -> None:
    assert shipped_adapter("task") == ROOT / "examples/adapters/task"
    assert adapter_path("shipped:safety") == ROOT / "examples/adapters/safety"
    assert adapter_path("some/folder") == Path("some/folder")
    with pytest.raises(
        AdapterError, match="named 'shipped:tusk': expected one of shipped:risk, shipped:safety, shipped:task"
    ):
        adapter_path("shipped:tusk")


def test_shipped_adapters_are_found_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shipped_by_us/adapters/task"
    folder.mkdir(parents=True)
    (tmp_path / "shipped_by_us/__init__.py").touch()
    (folder / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(shipped, "CHECKOUT", tmp_path / "none")
    monkeypatch.setattr(shipped, "INSTALLED", "shipped_by_us")
    with pytest.raises(AdapterError, match="expected one of none"):
        shipped_adapter("task")
    monkeypatch.syspath_prepend(tmp_path)
    assert shipped_adapter("task") == folder


def test_groups_wait_for_their_adapters_and_warn_when_idle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    settings = Settings(groups=("a + b", "b+c"), max_lora_rank=8)
    for name, digest in (("a", "x"), ("b", "y")):
        fill(registry, AdapterRecord(name, digest, adapter_info(rank=5), ""))
    assert declared_groups(settings, registry) == [{"x": 5, "y": 5}]
    with caplog.at_level(logging.WARNING, "fusion"):
        warn_of_idle_groups(settings, registry)
    over, waits = (record.getMessage() for record in caplog.records)
    assert over == "FUSION_GROUPS: 'a + b' has no stack: rank 10, over FUSION_MAX_LORA_RANK=8"
    assert waits == "FUSION_GROUPS: 'b+c' waits for its adapters 'c'"
    registry.close()


async def test_mixing_that_is_switched_off_is_not_proven(anyio_backend: str) -> None:
    settings, engine = Settings(mixed="off"), cast(Any, None)
    assert not _engine_options(settings).mixing
    proof = await _prove(settings, engine, {})
    assert (proof.proven, proof.reason) == (False, "switched off by FUSION_MIXED=off")


def test_a_start_without_a_base_names_the_next_step(tmp_path: Path) -> None:
    settings = Settings(base="./no-such-base", data=tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"python -m training.base ./no-such-base"), open_registry(settings):
        pass


def test_a_registry_that_fails_to_open_releases_the_data_folder(tmp_path: Path) -> None:
    settings = Settings(base=str(BASE), data=tmp_path / "data", database="nonsense://")
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be kept"), open_registry(settings):
            pass
    with hold_data_folder(settings.data):
        pass


def test_the_door_opens_without_the_heavy_libraries() -> None:
    code = """
import sys, service
print({"torch", "vllm", "bentoml"} & set(sys.modules))
from service import Settings
print({"vllm", "bentoml"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["set()", "set()"], done.stderr
