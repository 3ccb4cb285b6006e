"""A base's folder that cannot be served ends the start before vLLM is imported, by its true reason."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from service.engine.base_folder import BaseModelError, check_folder, has_flag
from tests.conftest import BASE, ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.zeros(8)}, base / "model.safetensors")
    return base


def make_pointer(base: Path) -> None:
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def make_adapter(base: Path) -> None:
    (base / "config.json").rename(base / "adapter_config.json")


def cut_weights(base: Path) -> None:
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-1])


def cut_header(base: Path) -> None:
    (base / "model.safetensors").write_bytes((1000).to_bytes(8, "little") + b"{}")


def replace_weights(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>")


def drop_shard(base: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def break_index(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text("[]")


def drop_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def break_config(base: Path) -> None:
    (base / "config.json").write_text("{")


def replace_config(base: Path) -> None:
    (base / "config.json").write_text('{"peft_type": "LORA"}')


def nest(base: Path) -> None:
    (base / "snapshot").mkdir()
    (base / "config.json").rename(base / "snapshot/config.json")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (make_pointer, "model.safetensors' is a Git LFS pointer, not the file itself: run `git lfs pull` in"),
        (make_adapter, "is a LoRA adapter: name it in FUSION_ADAPTERS=NAME=.*/base, and the model that it was"),
        (cut_weights, r"ends after \d+ bytes, it should have \d+: download it again"),
        (cut_header, "ends after 10 bytes, it should have 1008"),
        (replace_weights, "is not in safetensors format: download it again"),
        (drop_shard, "lacks 1 of its 2 files of weights, the first is 'model-00001-of-00002.safetensors'"),
        (break_index, "model.safetensors.index.json' cannot be read"),
        (drop_weights, r"has no weights: expected \*.safetensors beside config.json"),
        (break_config, "config.json' cannot be read as JSON: "),
        (replace_config, "config.json' has no `model_type`"),
        (nest, r"has no config.json: .*; did you mean '.*/base/snapshot'\?"),
    ],
)
def test_a_folder_that_is_not_a_whole_base_is_refused_by_name(
    damage: Callable[[Path], None], says: str, folder: Path
) -> None:
    check_folder(str(folder))
    damage(folder)
    with pytest.raises(BaseModelError, match=says):
        check_folder(str(folder))


def test_weights_may_lie_elsewhere_when_vllm_is_told_so(folder: Path) -> None:
    drop_weights(folder)
    check_folder(str(folder), ["--load-format", "dummy"])
    check_folder(str(folder), ["--load_format=runai_streamer"])


def test_flags_are_seen_as_vllm_spells_them() -> None:
    for given in ("--trust-remote-code", "--trust_remote_code", "--trust-remote-code=true"):
        assert has_flag(["--dtype", "float32", given], "--trust-remote-code")
    assert not has_flag(["--no-trust-remote-code", "--trust"], "--trust-remote-code")


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(BaseModelError, match="is a GGUF file: expected a folder in Hugging Face's format"):
        check_folder(str(tmp_path / "model.gguf"))


def test_names_on_the_hub_are_left_to_it() -> None:
    check_folder("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_real_bases_pass() -> None:
    check_folder(str(BASE))
    with pytest.raises(BaseModelError, match="is a LoRA adapter"):
        check_folder(str(ROOT / "examples/adapters/task"))
