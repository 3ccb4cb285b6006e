"""Adapters that do not belong together are refused with the two named, and those that do are fused and said so."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from adapters import (
    AdapterError,
    LoraAdapter,
    LoraModule,
    check_together,
    fuse,
    make_adapter,
    match_adapter,
    parse,
    save,
)
from adapters.cli import main
from adapters.convert import convert
from adapters.module_names import match_names, split_root, unwrap
from tests.adapters.samples import BASE, SHAPES, adapter

Q0 = "model.layers.0.self_attn.q_proj"
Q0_VISION = "model.language_model.layers.0.self_attn.q_proj"


def square(*modules: str, base: str | None = BASE) -> LoraAdapter:
    torch.manual_seed(0)
    return make_adapter({name: LoraModule(torch.randn(2, 4), torch.randn(4, 2), 1.0) for name in modules}, base)


REFUSED: Mapping[str, tuple[str, str, LoraAdapter, LoraAdapter]] = {
    "E1, only suffixes": ("modules", "the same ending", square(Q0), square(Q0_VISION)),
    "review, only a head and suffixes": (
        "modules",
        "the same ending",
        square(Q0, "lm_head"),
        square(Q0_VISION, "lm_head"),
    ),
    "E1, another class": ("modules", "the same ending", square(Q0), square("layers.0.self_attn.q_proj")),
    "E1, other targets elsewhere": ("modules", "no module", square(Q0), square(f"{Q0_VISION[:-6]}k_proj")),
    "E1, another family": ("modules", "no module", square(Q0), square("gpt_neox.layers.0.attention.dense")),
    "E1, nothing says the base": (
        "modules",
        "--same-base",
        square(Q0),
        square("model.layers.0.mlp.up_proj", base=None),
    ),
    "E3, other bases": ("base", "--same-base", square(Q0, base="org/one"), square(Q0, base="org/two")),
    "another size": ("shape", "different bases", square(Q0), make_adapter(dict(adapter(1).modules), BASE)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_belong_together_is_refused(name: str) -> None:
    reason, part, a, b = REFUSED[name]
    with pytest.raises(AdapterError, match=part) as caught:
        fuse(parse("0.6*a + 0.4*b"), {"a": a, "b": b})
    assert caught.value.reason == reason
    assert "'a'" in str(caught.value)
    assert "'b'" in str(caught.value)


SAME = [
    (BASE, BASE, 0),
    ("org/Llama-3", "/models/llama-3", 1),
    ("org/Llama-3", "/models/Llama-3/", 1),
    ("org/Llama-3", "/cache/models--org--Llama-3/snapshots/0123abcd", 1),
    ("C:\\models\\Llama-3", "llama-3", 1),
    (None, "org/Llama-3", 0),
]


@pytest.mark.parametrize(("one", "two", "notes"), SAME)
def test_a_base_spelled_otherwise_is_the_same(one: str | None, two: str, notes: int) -> None:
    """E3: PEFT's add_weighted_adapter sums such adapters, too."""
    family = {"a": square(Q0, base=one), "b": square(Q0, base=two)}
    assert len(check_together(family)) == notes
    fused, _ = fuse(parse("a + b"), family)
    assert torch.allclose(fused.delta(Q0), family["a"].delta(Q0) + family["b"].delta(Q0))


def test_adapters_of_one_base_need_not_share_a_module() -> None:
    fused, _ = fuse(parse("a + b"), {"a": square(Q0), "b": square("model.layers.0.mlp.up_proj")})
    assert len(fused.modules) == 2


def test_same_base_says_so() -> None:
    family = {"a": square(Q0, base="x"), "b": square(Q0, base="y")}
    assert fuse(parse("a + b"), family, same_base=True)[0].base == "x"


def test_the_command_refuses_and_names_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """E1 and E3, up to the adapter that the way out gives."""
    save(square(Q0), tmp_path / "a")
    save(square(Q0_VISION), tmp_path / "b")
    named = ["--adapter", f"a={tmp_path / 'a'}"]
    command = ["fuse", "0.6*a + 0.4*b", *named, "--out", str(tmp_path / "out"), "--adapter"]
    assert main([*command, f"b={tmp_path / 'b'}"]) == 2
    assert "`lora-fusion convert SECOND --like FIRST --out DIR`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    arguments = ["convert", str(tmp_path / "b"), "--like", str(tmp_path / "a"), "--out", str(tmp_path / "c")]
    assert main(arguments) == 0
    assert "read under the base's names" in capsys.readouterr().out
    assert main([*command, f"b={tmp_path / 'c'}"]) == 0
    save(square(Q0, base="other"), tmp_path / "d")
    assert main([*command[:-3], "--out", str(tmp_path / "two"), "--adapter", f"b={tmp_path / 'd'}"]) == 2
    assert "--same-base" in capsys.readouterr().err
    assert main([*command[:-3], "--out", str(tmp_path / "two"), "--same-base", "--adapter", f"b={tmp_path / 'd'}"]) == 0


def test_convert_like_another_needs_one_place_of_layers(tmp_path: Path) -> None:
    save(square("encoder.layers.0.q", "decoder.layers.0.q"), tmp_path / "a")
    with pytest.raises(AdapterError, match="expected one place"):
        convert(tmp_path / "a", tmp_path / "out", like=square(Q0))


NAMES = {
    f"base_model.model.{Q0}": (Q0, True),
    f"base_model.model.base_model.model.{Q0}": (Q0, True),
    f"module.base_model.model._orig_mod.{Q0}": (Q0, True),
    f"_orig_mod.{Q0}": (Q0, False),
    "base_model.model.module.x": ("module.x", True),
    "model.base_model.x": ("model.base_model.x", False),
}


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_are_stripped(name: str) -> None:
    assert unwrap(name) == NAMES[name]


@pytest.mark.parametrize(
    ("name", "root", "tail"),
    [
        (Q0, "model", Q0[6:]),
        ("layers.0.q", "", "layers.0.q"),
        ("lm_head", "", "lm_head"),
        ("a.b", "a", "b"),
        ("0.q", "", "0.q"),
    ],
)
def test_a_name_is_root_and_tail(name: str, root: str, tail: str) -> None:
    assert split_root(name) == (root, tail)


VISION = {name.replace("model.", "model.language_model.", 1): shape for name, shape in SHAPES.items()}
FLAT = {name.removeprefix("model."): shape for name, shape in SHAPES.items()}
TWO_PLACES = {**VISION, **{name.replace("language_model", "other"): shape for name, shape in VISION.items()}}


@pytest.mark.parametrize("base", [SHAPES, VISION, FLAT], ids=["text", "vision", "flat"])
@pytest.mark.parametrize("own", [SHAPES, VISION, FLAT], ids=["text", "vision", "flat"])
def test_the_one_reading_that_fits_the_base_is_taken(
    own: Mapping[str, tuple[int, int]], base: Mapping[str, tuple[int, int]]
) -> None:
    names = match_names(own, base)
    assert {names.get(name, name): shape for name, shape in own.items()} == base
    assert bool(names) == (own != base)


@pytest.mark.parametrize("base", [TWO_PLACES, {**VISION, "model.language_model.layers.0.self_attn.q_proj": (1, 1)}, {}])
def test_nothing_is_renamed_where_no_one_reading_fits(base: Mapping[str, tuple[int, int]]) -> None:
    assert match_names(SHAPES, base) == {}


def test_an_adapter_with_another_root_is_read_under_the_base_s_names() -> None:
    matched = match_adapter(adapter(1), VISION)
    assert list(matched.modules) == sorted(VISION)
    assert "model.language_model" in matched.notes[0]
    assert match_adapter(adapter(1), SHAPES).notes == ()


@pytest.mark.parametrize(("rows", "fits"), [(64, True), (65, False)])
def test_a_copy_of_another_vocabulary_is_refused(rows: int, fits: bool) -> None:
    """A7: PEFT would put the copy into the base."""
    modules = {"lm_head": LoraModule(torch.ones(2, 32), torch.ones(64, 2), 1.0)}
    with_copy = LoraAdapter(modules, BASE, copies={"lm_head.weight": (rows, 32)})
    if fits:
        assert match_adapter(with_copy, {"lm_head": (64, 32)}) is with_copy
    else:
        with pytest.raises(AdapterError, match="the vocabulary was changed"):
            match_adapter(with_copy, {"lm_head": (64, 32)})
