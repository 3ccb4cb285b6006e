"""Weights in parts, as `PreTrainedModel.save_pretrained` writes them (r24): `lora-fusion convert` joins them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from adapters import AdapterError, load, save
from adapters.cli import main
from tests.adapters.conversions import check_refusal, zipped
from tests.adapters.peft_models import base_model
from tests.adapters.samples import CONFIG, WEIGHTS, adapter, same

INDEX = f"{WEIGHTS}.index.json"


def split(folder: Path, *, kind: str = "safetensors", index: bool = True) -> Path:
    """A folder with its weights in parts."""
    save(adapter(1), folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    pattern = f"adapter_model{{suffix}}.{kind}"
    is_safe = kind == "safetensors"
    save_torch_state_dict(
        tensors, folder, filename_pattern=pattern, max_shard_size=400, safe_serialization=is_safe, force_contiguous=True
    )
    assert len(parts(folder)) > 2
    if not index:
        (folder / f"adapter_model.{kind}.index.json").unlink()
    return folder


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("adapter_model-*"))


SOURCES: dict[str, Callable[[Path], Path]] = {
    "parts": split,
    "without their index": lambda folder: split(folder, index=False),
    "pickled": lambda folder: split(folder, kind="bin"),
    "one of them": lambda folder: parts(split(folder))[1],
    "the index": lambda folder: split(folder) / INDEX,
    "in a zip": lambda folder: zipped(split(folder)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_parts_are_joined(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = SOURCES[name](tmp_path / "in")
    assert main(["convert", str(source), "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []
    assert same(load(tmp_path / "out"), adapter(1))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS}


def test_parts_beside_one_file_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT and vLLM read the one file."""
    save(adapter(2), tmp_path / "one")
    shutil.copy(tmp_path / "one" / WEIGHTS, split(tmp_path / "parts"))
    assert main(["convert", str(tmp_path / "parts"), "--out", str(tmp_path / "out")]) == 0
    assert f"note: read {WEIGHTS}, and not the" in capsys.readouterr().out
    assert same(load(tmp_path / "out"), adapter(2))


def test_nobody_else_reads_parts(tmp_path: Path) -> None:
    """Where PEFT reads them one day, `load` should."""
    split(tmp_path / "parts")
    with pytest.raises(ValueError, match="Can't find weights|Repo id must be"):  # it looks on the hub then
        peft.PeftModel.from_pretrained(base_model(), str(tmp_path / "parts"))
    with pytest.raises(AdapterError, match=r"neither PEFT nor vLLM reads parts; make .* `lora-fusion convert FOLDER"):
        load(tmp_path / "parts")


def without_part(folder: Path) -> Path:
    parts(split(folder))[1].unlink()
    return folder


def with_other_parts(folder: Path) -> Path:
    """Of two savings, the second in fewer parts."""
    shutil.copy(parts(split(folder))[0], folder / "adapter_model-00001-of-00002.safetensors")
    return folder


def with_index(text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (split(folder) / INDEX).write_text(text)
        return folder

    return make


def with_many(folder: Path) -> Path:
    save(adapter(1), folder)
    (folder / WEIGHTS).rename(folder / "adapter_model-00001-of-90000.safetensors")
    return folder


def with_tensor_twice(folder: Path) -> Path:
    first, second, *_ = parts(split(folder))
    save_file({**load_file(first), **load_file(second)}, first)
    return folder


def with_another_tensor(folder: Path) -> Path:
    first = parts(split(folder))[0]
    save_file({**load_file(first), "another": torch.ones(1)}, first)
    return folder


def damaged(folder: Path) -> Path:
    first = parts(split(folder))[0]
    first.write_bytes(first.read_bytes()[:50])
    return folder


REFUSED: dict[str, tuple[str, str, Callable[[Path], Path]]] = {
    "a part is missing": ("missing_weights", "part 'adapter_model-00002-of-", without_part),
    "of two savings": ("missing_weights", "there are parts of 2 and of", with_other_parts),
    "too many": ("missing_weights", "there are parts of 90000", with_many),
    "a tensor twice": ("not_safetensors", "both hold the tensor", with_tensor_twice),
    "another tensor": ("not_safetensors", "says that 'another' is in None", with_another_tensor),
    "a damaged part": ("not_safetensors", "adapter_model-00001-of-", damaged),
    "a damaged index": ("not_safetensors", "cannot be read as JSON", with_index("{")),
    "an index of something else": ("not_safetensors", "has no weight_map", with_index("[]")),
    "an index of other parts": ("not_safetensors", "'x' is in 'y', but", with_index('{"weight_map": {"x": "y"}}')),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_adapter_is_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_refusal(REFUSED[name], tmp_path, capsys)
