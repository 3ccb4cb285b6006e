"""Loading: exact round trips, and the ranks and scalings that PEFT reads."""

from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, strategies as st

from adapters import AdapterError, LoraAdapter, LoraModule, load, make_adapter, save
from tests.adapters.peft_models import base_model, peft_deltas
from tests.adapters.samples import BASE, WEIGHTS, adapter, dense, families, gap, same, size


@given(
    families(),
    st.lists(st.integers(1, 64), min_size=4, max_size=4),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_a_round_trip_is_exact(
    tmp_path_factory: pytest.TempPathFactory,
    family: dict[str, LoraAdapter],
    alphas: list[int],
    dtype: torch.dtype,
    rslora: bool,
) -> None:
    some = next(iter(family.values()))
    modules = {
        name: LoraModule(m.a.to(dtype), m.b.to(dtype), alpha / (m.rank**0.5 if rslora else m.rank))
        for (name, m), alpha in zip(some.modules.items(), alphas, strict=False)
    }
    original = make_adapter(modules, BASE)
    folder = tmp_path_factory.mktemp("round") / "adapter"
    save(original, folder)
    assert same(load(folder), original)


def test_the_digest_sees_every_part() -> None:
    module = LoraModule(torch.ones(2, 4), torch.ones(4, 2), 1.0)
    variants = [
        {"m": module},
        {"n": module},
        {"m": module, "n": module},
        {"m": LoraModule(module.a, module.b, 2.0)},
        {"m": LoraModule(2 * module.a, module.b, 1.0)},
        {"m": LoraModule(module.a, 2 * module.b, 1.0)},
        {"m": LoraModule(module.a.half(), module.b.half(), 1.0)},
        {"m": LoraModule(torch.ones(1, 8), torch.ones(8, 1), 1.0)},
    ]
    assert len({make_adapter(v, None).digest for v in variants}) == len(variants)
    assert make_adapter({"m": module}, "x").digest == make_adapter({"m": module}, None).digest


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"q_proj": 5}},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6}, "alpha_pattern": {"v_proj": 3}},
        {
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 7},
            "alpha_pattern": {r".*\.(0|1)\..*q_proj": 9},
        },
    ],
)
def test_we_read_what_peft_writes(tmp_path: Path, rslora: bool, patterns: Mapping[str, object]) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=rslora,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        **patterns,
    )
    model = peft.get_peft_model(base_model(), config)
    model.save_pretrained(str(tmp_path))
    ours = load(tmp_path)
    assert gap(dense(ours), peft_deltas(model)) <= 1e-6 * size(dense(ours))
    assert len(ours.modules) == 3
    save(ours, tmp_path / "again")
    assert same(load(tmp_path / "again"), ours)


def test_tensors_do_not_hang_on_the_file(tmp_path: Path) -> None:
    save(adapter(1), tmp_path / "one")
    found = load(tmp_path / "one")
    content = bytearray((tmp_path / "one" / WEIGHTS).read_bytes())
    content[-4096:] = bytes(len(content[-4096:]))
    with (tmp_path / "one" / WEIGHTS).open("r+b") as stream:
        stream.write(content)
    assert same(found, adapter(1))


def test_a_lazy_adapter_reads_modules_when_asked_and_is_the_same(tmp_path: Path) -> None:
    save(adapter(1), tmp_path / "a")
    lazy = load(tmp_path / "a", lazy=True)
    eager = load(tmp_path / "a")
    assert (lazy.rank, lazy.dtype, lazy.nbytes, lazy.shapes) == (eager.rank, eager.dtype, eager.nbytes, eager.shapes)
    assert lazy.digest == eager.digest
    assert same(lazy, eager)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        lazy.modules[next(iter(lazy.shapes))]
