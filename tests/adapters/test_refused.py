"""What `load` refuses: each case spoils one thing in a good folder."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import AdapterError, load, save
from tests.adapters.samples import CONFIG, WEIGHTS, adapter, same

Q0 = "model.layers.0.self_attn.q_proj"


Spoil = Callable[[Path], object]


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


def together(*spoils: Spoil) -> Spoil:
    def spoil(folder: Path) -> None:
        for one in spoils:
            one(folder)

    return spoil


def nested(folder: Path) -> None:
    """E6."""
    (folder / "checkpoint-5").mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(folder / "checkpoint-5" / name)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


A, B = f"base_model.model.{Q0}.lora_A.weight", f"base_model.model.{Q0}.lora_B.weight"
ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
REFUSED: list[tuple[str, Spoil]] = [
    ("missing_config", lambda folder: (folder / CONFIG).unlink()),
    ("missing_config", nested),
    ("missing_weights", lambda folder: (folder / WEIGHTS).unlink()),
    ("pickle_only", pickled),
    ("bad_config", raw(CONFIG, lambda _: b"")),
    ("bad_config", raw(CONFIG, lambda text: text[:-5])),
    ("bad_config", raw(CONFIG, lambda _: b"[]")),
    ("bad_config", raw(CONFIG, lambda _: b"\xff\xfe{}")),
    ("bad_config", raw(CONFIG, lambda _: b"[" * 100_000)),
    ("shape", raw(CONFIG, lambda text: text.replace(b'"r": 3', b'"r": 3, "r": 4'))),
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
    ("bad_config", config(rank_pattern={"(?=q)": 3})),
    ("bad_config", config(rank_pattern={".*(((q{250}){250}){250}){250}": 3})),
    ("bad_config", config(rank_pattern={f"q{n}": 3 for n in range(4097)})),
    ("bad_config", config(rank_pattern={f"{n}{'q' * 1000}": 3 for n in range(600)})),
    ("bad_config", config(base_model_name_or_path="a" * 1025)),
    ("bad_config", config(base_model_name_or_path="\ud800")),
    ("bad_config", config(base_model_name_or_path="a\nb")),
    ("bad_config", config(new_key=[0] * 140_000)),
    ("bad_config", raw(CONFIG, lambda text: text.replace(b'"r": 3', b'"r": ' + b"3" * 401))),
    ("bad_config", config(alpha_pattern={"q_proj": None})),
    ("not_lora", config(peft_type="LOHA")),
    ("not_lora", config(peft_type=None)),
    ("dora", config(use_dora=True)),
    ("bad_config", config(bias="some")),
    ("bad_config", config(bias=["all"])),
    ("modules_to_save", config(modules_to_save=["lm_head"])),
    ("trainable_tokens", config(trainable_token_indices=[1, 2])),
    ("layer_replication", config(layer_replication=[[0, 1]])),
    ("init", config(init_lora_weights="pissa_niter_4")),
    ("init", config(init_lora_weights="olora")),
    ("init", config(init_lora_weights="corda")),
    ("init", config(init_lora_weights="loftq")),
    ("init", config(init_lora_weights="newest")),
    ("target_parameters", config(target_parameters=["mlp.gate.weight"])),
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
    ("missing_weights", tensors(lambda t: t.update({"base_model.model.embed.lora_embedding_A": torch.ones(3, 5)}))),
    ("bias", together(config(bias="all"), tensors(lambda t: t.update({f"{A[:-14]}.bias": torch.ones(3)})))),
    ("modules_to_save", tensors(lambda t: t.update({f"{A[:-14]}.base_layer.weight": torch.ones(3, 5)}))),
    ("not_safetensors", raw(WEIGHTS, lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")),
    ("bad_config", raw(CONFIG, lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")),
    ("missing_weights", lambda folder: (folder / WEIGHTS).rename(folder / "model.safetensors")),
    ("missing_config", lambda folder: (folder / CONFIG).rename(folder / "config.json")),
    ("modules_to_save", tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(3, 5)}))),
    ("not_lora", tensors(lambda t: t.update({A.removeprefix("base_model.model."): t.pop(A)}))),
    ("not_lora", tensors(lambda t: t.update({A.replace("lora_A", "LORA_A"): t.pop(A)}))),
    ("not_lora", tensors(lambda t: t.update({A.replace("lora_A", "lora_down"): t.pop(A)}))),
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
    ("not_safetensors", header('{"a":{"dtype":"F32","shape":[140737488355327,1],"data_offsets":[0,4]}}', bytes(4))),
    ("not_safetensors", header(f'{{"a":{{"dtype":"F32","shape":[{"1," * 8}1],"data_offsets":[0,4]}}}}', bytes(4))),
    ("not_safetensors", header(f'{{"a":{ENTRY}}} x', bytes(4))),
    ("not_safetensors", header(f'{{"a":{ENTRY},}}', bytes(4))),
    ("not_safetensors", header(f'{{"__metadata__":{{"a":1}},"a":{ENTRY}}}', bytes(4))),
    ("not_safetensors", header(f'{{"__metadata__":{{"a":"{"x" * 2**20}"}},"a":{ENTRY}}}', bytes(4))),
    ("not_safetensors", header("{" + ",".join(f'"{n}":{ENTRY}' for n in range(2**16 + 1)) + "}", bytes(4))),
    ("missing_weights", header("{}")),
    ("missing_weights", header(' { "__metadata__" : { "a" : "{\\"}}" } } ')),
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
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_fifo_is_refused_without_waiting_for_it(tmp_path: Path, name: str) -> None:
    save(adapter(1), tmp_path / "bad")
    (tmp_path / "bad" / name).unlink()
    os.mkfifo(tmp_path / "bad" / name)
    with pytest.raises(AdapterError, match="not a regular file"):
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
    config(
        init_lora_weights="gaussian",
        lora_dropout=0.1,
        modules_to_save=[],
        megatron_core="x",
        new_key=1,
        layers_to_transform=[0],
        layers_pattern=3,
    )(tmp_path / "one")
    assert same(load(tmp_path / "one"), adapter(1))
