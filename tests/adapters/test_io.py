"""Adapter folders: exact round trips, the same bytes, PEFT's reading of them, and every refusal."""

from __future__ import annotations

import errno
import json
import os
import resource
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapters import AdapterError, LoraAdapter, LoraModule, fuse, load, make_adapter, parse, save
from tests.adapters.samples import BASE, SHAPES, adapter, dense, dense_sum, families, gap, size

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"


class Node(nn.Module):
    """A module that is only there to give its children their names."""

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks for it in a causal language model."""


def base_model() -> nn.Module:
    """Linear layers under the base's own names."""
    root = Node()
    for name, (d_out, d_in) in SHAPES.items():
        *path, leaf = name.split(".")
        node: nn.Module = root
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, Node())
            node = getattr(node, part)
        node.add_module(leaf, nn.Linear(d_in, d_out, bias=False))
    return root


def peft_deltas(model: nn.Module) -> dict[str, Tensor]:
    """ΔW of every module as PEFT computes it."""
    found = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            found[name.removeprefix("base_model.model.")] = module.get_delta_weight("default").detach().double()
    return found


def same(one: LoraAdapter, two: LoraAdapter) -> bool:
    return (
        one.digest == two.digest
        and one.base == two.base
        and list(one.modules) == list(two.modules)
        and all(
            torch.equal(m.a, two.modules[n].a)
            and torch.equal(m.b, two.modules[n].b)
            and m.a.dtype == two.modules[n].a.dtype
            and m.scaling == two.modules[n].scaling
            for n, m in one.modules.items()
        )
    )


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


def test_tensors_do_not_hang_on_the_file(tmp_path: Path) -> None:
    save(adapter(1), tmp_path / "one")
    found = load(tmp_path / "one")
    content = bytearray((tmp_path / "one" / WEIGHTS).read_bytes())
    content[-4096:] = bytes(len(content[-4096:]))
    with (tmp_path / "one" / WEIGHTS).open("r+b") as stream:
        stream.write(content)
    assert same(found, adapter(1))


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


# What is refused. Each case spoils one thing in a good folder.

Spoil = Callable[[Path], None]


def config(**changes: object) -> Spoil:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**content, **changes}))

    return spoil


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS)

    return spoil


def raw(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


def header(text: str, data: bytes = b"") -> Spoil:
    return raw(WEIGHTS, lambda _: struct.pack("<Q", len(text.encode())) + text.encode() + data)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


A, B = f"base_model.model.{Q0}.lora_A.weight", f"base_model.model.{Q0}.lora_B.weight"
ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
REFUSED: list[tuple[str, Spoil]] = [
    ("missing_config", lambda folder: (folder / CONFIG).unlink()),
    ("missing_weights", lambda folder: (folder / WEIGHTS).unlink()),
    ("pickle_only", pickled),
    ("bad_config", raw(CONFIG, lambda _: b"")),
    ("bad_config", raw(CONFIG, lambda text: text[:-5])),
    ("bad_config", raw(CONFIG, lambda _: b"[]")),
    ("bad_config", raw(CONFIG, lambda _: b"\xff\xfe{}")),
    ("bad_config", raw(CONFIG, lambda _: b"[" * 100_000)),
    ("bad_config", raw(CONFIG, lambda text: text.replace(b'"r": 3', b'"r": 3, "r": 4'))),
    ("bad_config", raw(CONFIG, lambda text: text.replace(b'"r": 3', b'"r": NaN'))),
    ("bad_config", raw(CONFIG, lambda text: text + b" " * (5 << 20))),
    ("bad_config", config(r=0)),
    ("bad_config", config(r=True)),
    ("bad_config", config(r="3")),
    ("bad_config", config(lora_alpha=None)),
    ("bad_config", config(lora_alpha=1e400)),
    ("bad_config", config(use_rslora="yes")),
    ("bad_config", config(base_model_name_or_path=7)),
    ("bad_config", config(rank_pattern=["q_proj"])),
    ("bad_config", config(rank_pattern={"q_proj": "3"})),
    ("bad_config", config(rank_pattern={"(": 3})),
    ("bad_config", config(rank_pattern={"(a+)+b": 3})),
    ("bad_config", config(rank_pattern={"(.*.*.*|1)!": 3})),
    ("bad_config", config(rank_pattern={f".*{n}": 3 for n in range(17)})),
    ("bad_config", config(rank_pattern={f"q{n}": 3 for n in range(4097)})),
    ("bad_config", config(alpha_pattern={"q_proj": None})),
    ("not_lora", config(peft_type="LOHA")),
    ("not_lora", config(peft_type=None)),
    ("dora", config(use_dora=True)),
    ("lora_bias", config(lora_bias=True)),
    ("bias", config(bias="all")),
    ("modules_to_save", config(modules_to_save=["lm_head"])),
    ("trainable_tokens", config(trainable_token_indices=[1, 2])),
    ("layer_replication", config(layer_replication=[[0, 1]])),
    ("init", config(init_lora_weights="pissa_niter_4")),
    ("init", config(init_lora_weights="olora")),
    ("init", config(init_lora_weights="lora_ga")),
    ("fan_in_fan_out", config(fan_in_fan_out=True)),
    ("target_parameters", config(target_parameters=["experts.gate_up_proj"])),
    ("alora", config(alora_invocation_tokens=[1])),
    ("qalora", config(use_qalora=True)),
    ("bdlora", config(use_bdlora={"nblocks": 2})),
    ("arrow", config(arrow_config={"top_k": 2})),
    ("kasa", config(kasa_config={"x": 1})),
    ("monteclora", config(monteclora_config={"x": 1})),
    ("shape", config(r=4)),
    ("shape", config(rank_pattern={"q_proj": 2})),
    ("shape", tensors(lambda t: t.update({A: t[A][:2].clone()}))),
    ("shape", tensors(lambda t: t.update({A: t[A][None].clone()}))),
    ("shape", tensors(lambda t: t.update({A: torch.zeros(3, 0)}))),
    ("missing_weights", tensors(lambda t: t.pop(A))),
    ("missing_weights", tensors(lambda t: t.pop(B))),
    ("missing_weights", tensors(lambda t: t.clear())),
    ("nan", tensors(lambda t: t[A].fill_(float("nan")))),
    ("nan", tensors(lambda t: t[B].view(-1)[-1:].fill_(float("inf")))),
    ("dtype", tensors(lambda t: t.update({A: t[A].to(torch.int8)}))),
    ("dora", tensors(lambda t: t.update({A.replace("lora_A", "lora_magnitude_vector"): torch.ones(3)}))),
    ("lora_bias", tensors(lambda t: t.update({B.replace("weight", "bias"): torch.ones(3)}))),
    ("embedding", tensors(lambda t: t.update({"base_model.model.embed.lora_embedding_A": torch.ones(3, 5)}))),
    ("modules_to_save", tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(3, 5)}))),
    ("not_lora", tensors(lambda t: t.update({A.removeprefix("base_model.model."): t.pop(A)}))),
    ("not_lora", tensors(lambda t: t.update({A.replace(".weight", ".default.weight"): t.pop(A)}))),
    ("truncated", raw(WEIGHTS, lambda _: b"")),
    ("truncated", raw(WEIGHTS, lambda data: data[:100])),
    ("truncated", raw(WEIGHTS, lambda data: data[:-1])),
    ("not_safetensors", raw(WEIGHTS, lambda data: data + b"\0")),
    ("not_safetensors", raw(WEIGHTS, lambda data: b"PK\x03\x04" + bytes(range(250)) * 9)),
    ("not_safetensors", header("{")),
    ("not_safetensors", header("[]")),
    ("not_safetensors", header('{"a":1}')),
    ("not_safetensors", header('{"a":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}', bytes(4))),
    ("not_safetensors", header('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', bytes(4))),
    ("dtype", header('{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', bytes(4))),
    ("not_safetensors", header(f'{{"a":{ENTRY},"a":{ENTRY}}}', bytes(4))),
    ("not_safetensors", header(f'{{"a":{ENTRY},"b":{ENTRY}}}', bytes(4))),
    ("missing_weights", header("{}")),
]


@pytest.mark.parametrize(("reason", "spoil"), REFUSED)
def test_what_is_refused_by_reason(tmp_path: Path, reason: str, spoil: Spoil) -> None:
    save(adapter(1), tmp_path / "bad")
    assert same(load(tmp_path / "bad"), adapter(1))
    spoil(tmp_path / "bad")
    with pytest.raises(AdapterError) as caught:
        load(tmp_path / "bad")
    assert caught.value.reason == reason, caught.value
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_fifo_is_refused_without_waiting_for_it(tmp_path: Path, name: str) -> None:
    save(adapter(1), tmp_path / "bad")
    (tmp_path / "bad" / name).unlink()
    os.mkfifo(tmp_path / "bad" / name)
    with pytest.raises(AdapterError, match="no plain file"):
        load(tmp_path / "bad")


def test_a_missing_folder_and_an_oversized_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="not a folder"):
        load(tmp_path / "nowhere")
    save(adapter(1), tmp_path / "one")
    limit = (tmp_path / "one" / WEIGHTS).stat().st_size
    assert load(tmp_path / "one", max_bytes=limit).digest == adapter(1).digest
    with pytest.raises(AdapterError) as caught:
        load(tmp_path / "one", max_bytes=limit - 1)
    assert caught.value.reason == "too_large"


def test_harmless_settings_are_accepted(tmp_path: Path) -> None:
    save(adapter(1), tmp_path / "one")
    config(init_lora_weights="gaussian", lora_dropout=0.1, modules_to_save=[], megatron_core="x", new_key=1)(
        tmp_path / "one"
    )
    assert same(load(tmp_path / "one"), adapter(1))


def test_a_hostile_pattern_takes_no_time(tmp_path: Path) -> None:
    long = "a" * 200
    module = LoraModule(torch.ones(2, 3), torch.ones(4, 2), 1.0)
    save(make_adapter({long: module}, None), tmp_path / "one")
    for pattern in ("(a|a)*b", "(?:a*)*b", "a*a*a*a*a*b", "((a+)?)+b"):
        config(rank_pattern={pattern: 2})(tmp_path / "one")
        with pytest.raises(AdapterError, match="simple pattern"):
            load(tmp_path / "one")


def test_a_lazy_adapter_reads_modules_when_asked_and_is_the_same(tmp_path: Path) -> None:
    save(adapter(1), tmp_path / "a")
    lazy = load(tmp_path / "a", lazy=True)
    eager = load(tmp_path / "a")
    assert (lazy.rank, lazy.dtype, lazy.nbytes, lazy.shapes) == (eager.rank, eager.dtype, eager.nbytes, eager.shapes)
    assert lazy.digest == eager.digest and same(lazy, eager)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        lazy.modules[next(iter(lazy.shapes))]
