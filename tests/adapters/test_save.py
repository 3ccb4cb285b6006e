"""Saving: the same bytes anywhere, which PEFT opens, whole or not at all."""

import errno
import json
import os
import resource
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file

from adapters import LoraModule, PeftDetails, fuse, load, make_adapter, parse, save
from tests.adapters.peft_models import base_model, peft_deltas
from tests.adapters.samples import BASE, CONFIG, SHAPES, WEIGHTS, adapter, dense, dense_sum, gap, same, size

Q0 = "model.layers.0.self_attn.q_proj"


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    backwards = make_adapter(dict(reversed(list(adapter(7).modules.items()))), BASE)
    for name, one in (("one", adapter(7)), ("two", adapter(7)), ("three", backwards)):
        save(one, tmp_path / name, provenance={"b": 1, "a": {"d": 2, "c": "é"}})
    contents = [
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two", "three")
    ]
    assert contents[0] == contents[1] == contents[2]
    assert set(contents[0]) == {CONFIG, WEIGHTS, "fusion.json"}
    assert json.loads(contents[0]["fusion.json"]) == {"a": {"c": "é", "d": 2}, "b": 1}


@pytest.mark.parametrize(
    "text",
    [
        "0.6*a + -0.4*b",
        "svd(a + b, rank=3)",
        "a",
        "ties(a + b, density=0.5)",
        "knots(a + b, density=0.5)",
        "slerp(a + b, t=0.3, from=a)",
        "safe_merge(a, safety=b, threshold=0.9)",
        "peft_ties(a + b, density=0.5)",
    ],
)
def test_peft_opens_what_we_write_and_sees_the_same_update(tmp_path: Path, text: str) -> None:
    family = {"a": adapter(1, {n: r for r, n in enumerate(SHAPES, 1)}), "b": adapter(2, {Q0: 2}, 16 / 3)}
    fused, _ = fuse(parse(text), family)
    save(fused, tmp_path / "fused", provenance={"recipe": text})
    model = peft.PeftModel.from_pretrained(base_model(), str(tmp_path / "fused"))
    whole = dense_sum(parse(text), family)
    assert gap(peft_deltas(model), dense(fused)) <= 1e-6 * size(whole)
    targets = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert targets == set(fused.modules)


def test_patterns_name_one_module_only(tmp_path: Path) -> None:
    """A top-level `q` beside `model.q`: a suffix rule would confuse them."""
    modules = {
        name: LoraModule(torch.ones(rank, 4), torch.ones(4, rank), float(rank))
        for name, rank in (("q", 2), ("model.q", 3), ("model.xq", 4), ("other.model.q", 1))
    }
    save(make_adapter(modules, None), tmp_path / "out")
    assert {n: m.rank for n, m in load(tmp_path / "out").modules.items()} == {n: m.rank for n, m in modules.items()}
    assert {n: m.scaling for n, m in load(tmp_path / "out").modules.items()} == {
        n: m.scaling for n, m in modules.items()
    }


def test_the_weights_are_the_bytes_that_safetensors_writes(tmp_path: Path) -> None:
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    chance = torch.Generator().manual_seed(0)
    modules = {
        f"layers.{i}": LoraModule(
            torch.randn(3, 5, generator=chance).to(one),
            torch.randn(7, 3, generator=chance).to(two).T.contiguous().T,
            1.0,
        )
        for i, (one, two) in enumerate(zip(kinds, kinds[1:] + kinds[:1], strict=True))
    }
    save(make_adapter(modules, None), tmp_path / "ours")
    factors = {(name, letter): factor for name, m in modules.items() for letter, factor in (("A", m.a), ("B", m.b))}
    tensors = {f"base_model.model.{n}.lora_{letter}.weight": f.contiguous() for (n, letter), f in factors.items()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_save_never_overwrites_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save(adapter(1), tmp_path / "one")
    for taken in ("one", "file", "dangling"):
        if taken == "file":
            (tmp_path / taken).write_text("mine")
        if taken == "dangling":
            (tmp_path / taken).symlink_to(tmp_path / "nowhere")
        with pytest.raises(FileExistsError, match=taken):
            save(adapter(2), tmp_path / taken)
    with pytest.raises(ValueError):
        save(adapter(2), tmp_path / "two", provenance={"x": float("nan")})
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "one"]
    assert same(load(tmp_path / "one"), adapter(1))


def test_a_disk_without_room_leaves_nothing_behind(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            save(adapter(1, 40), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_save_takes_over_an_empty_folder(tmp_path: Path) -> None:
    save(adapter(1), tmp_path)
    assert same(load(tmp_path), adapter(1))


def test_details_of_the_training_are_stated_and_read_by_peft(tmp_path: Path) -> None:
    modules = {name: LoraModule(m.a, m.b, 16 / 3**0.5) for name, m in adapter(1, 3).modules.items()}
    trained = make_adapter(modules, BASE)
    details: PeftDetails = {
        "use_rslora": True,
        "lora_dropout": 0.05,
        "target_modules": ["v_proj", "q_proj", "down_proj"],
    }
    save(trained, tmp_path / "out", details=details)
    content = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (content["r"], content["lora_alpha"], content["use_rslora"]) == (3, 16, True)
    assert content["lora_dropout"] == 0.05
    assert content["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert content["alpha_pattern"] == content["rank_pattern"] == {}
    assert same(load(tmp_path / "out"), trained)
    model = peft.PeftModel.from_pretrained(base_model(), str(tmp_path / "out"))
    assert gap(peft_deltas(model), dense(trained)) <= 1e-6 * size(dense(trained))


def test_target_modules_that_miss_a_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.v_proj'"):
        save(adapter(1), tmp_path / "out", details={"target_modules": ["q_proj", "xv_proj", "down_proj"]})
    assert os.listdir(tmp_path) == []
