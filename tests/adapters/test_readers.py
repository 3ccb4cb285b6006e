"""What is written is right for readers that know only `lora_alpha / r` (E2): each reader is its arithmetic."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters import LoraModule, fuse, load, make_adapter, parse, save
from adapters.cli import main
from tests.adapters.samples import BASE, CONFIG, SHAPES, WEIGHTS, adapter, dense, gap, same, size

Q0, V0, Q1, DOWN = SHAPES
Read = Callable[[Mapping[str, object], int, str], float]


def by_config(config: Mapping[str, object], rank: int, module: str) -> float:
    """SGLang and TensorRT-LLM: one scaling for all modules."""
    return float(str(config["lora_alpha"])) / int(str(config["r"]))


def by_own_rank(config: Mapping[str, object], rank: int, module: str) -> float:
    """llama.cpp: alpha over the rank of the module's own tensors."""
    return float(str(config["lora_alpha"])) / rank


def by_vllm(config: Mapping[str, object], rank: int, module: str) -> float:
    """vLLM: by the patterns."""
    from vllm.lora.peft_helper import PEFTHelper

    return float(PEFTHelper.from_dict(dict(config)).get_rank_and_scaling(module)[1])


READERS: dict[str, Read] = {"alpha / r": by_config, "alpha / own rank": by_own_rank, "vLLM": by_vllm}


def read(folder: Path, scaling: Read) -> dict[str, torch.Tensor]:
    """The dense updates as a reader computes them."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    found = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for name in SHAPES:
        a, b = (tensors.get(f"base_model.model.{name}.lora_{letter}.weight") for letter in "AB")
        if a is not None and b is not None:
            assert a.shape[0] <= config["r"], "it would not fit the reader's buffers"
            found[name] = scaling(config, a.shape[0], name) * (b.double() @ a.double())
    return found


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", ["0.6*wide + 0.4*narrow", "wide", "svd(wide + narrow, rank=5)", "-1*narrow + 2*odd"])
def test_a_fused_adapter_is_right_for_every_reader(tmp_path: Path, text: str, reader: str) -> None:
    family = {
        "wide": adapter(1, dict.fromkeys(SHAPES, 8)),
        "narrow": adapter(2, {Q0: 8, V0: 3}, 4.0),
        "odd": adapter(3, {V0: 1, DOWN: 6}, 16 / 3),
    }
    for name, one in family.items():
        save(one, tmp_path / name)
    named = [part for name in family for part in ("--adapter", f"{name}={tmp_path / name}")]
    assert main(["fuse", text, *named, "--out", str(tmp_path / "fused")]) == 0
    wanted = dense(fuse(parse(text), family)[0])
    assert gap(read(tmp_path / "fused", READERS[reader]), wanted) <= 1e-6 * size(wanted)
    assert len({facts.rank for facts in load(tmp_path / "fused").facts.values()}) == 1


@pytest.mark.parametrize("reader", READERS)
def test_one_rank_and_alpha_are_right_where_scalings_differ(tmp_path: Path, reader: str) -> None:
    modules = {
        name: LoraModule(torch.randn(rank, d_in), torch.randn(d_out, rank), scaling)
        for (name, (d_out, d_in)), rank, scaling in zip(SHAPES.items(), (1, 4, 4, 2), (0.3, 2.0, 2.0, 7.0), strict=True)
    }
    one = make_adapter(modules, BASE)
    save(one, tmp_path / "out", one_rank=True)
    assert gap(read(tmp_path / "out", READERS[reader]), dense(one)) <= 1e-6 * size(dense(one))


def test_an_adapter_of_one_rank_is_written_as_it_is(tmp_path: Path) -> None:
    save(adapter(1), tmp_path / "plain")
    save(adapter(1), tmp_path / "one-rank", one_rank=True)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "one-rank" / name).read_bytes()
    assert same(load(tmp_path / "one-rank"), adapter(1))


def test_without_padding_the_largest_rank_s_alpha_stands(tmp_path: Path) -> None:
    """`save` keeps every bit by default, so readers by their own rank need `one_rank`; those by the config do not."""
    mixed = adapter(1, {Q0: 8, V0: 2, Q1: 2, DOWN: 2}, 1.0)
    save(mixed, tmp_path / "out")
    assert gap(read(tmp_path / "out", by_config), dense(mixed)) == 0
    assert same(load(tmp_path / "out"), mixed)
