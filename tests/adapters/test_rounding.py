"""What is written is not rounded in silence: the adapters' dtype is kept where it holds the numbers, or on request."""

import json
from pathlib import Path

import pytest
import torch

from adapters import AdapterError, LoraAdapter, LoraModule, fuse, load, make_adapter, parse, save
from adapters.cli import main
from adapters.files.one_rank import to_one_rank
from adapters.files.rounding import TOLERANCE, round_factors
from tests.adapters.samples import BASE, SHAPES, adapter, dense, dense_sum, gap, size

NARROW = (torch.bfloat16, torch.float16)


def largest(found: LoraAdapter, wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a module."""
    return max(gap({"": delta}, {"": wanted[name]}) / size({"": wanted[name]}) for name, delta in dense(found).items())


def run_fuse(folder: Path, dtype: torch.dtype, text: str, *options: str) -> int:
    for seed, name in enumerate(("a", "b")):
        if not (folder / name).exists():
            save(adapter(seed, dtype=dtype), folder / name)
    named = [part for name in "ab" for part in ("--adapter", f"{name}={folder / name}")]
    return main(["fuse", text, *named, "--out", str(folder / "out"), *options])


# (recipe, whether the adapters' dtype holds the result)
FUSED = {
    "0.6*a + 0.4*b": False,
    "0.3*a": False,
    "svd(a + b, rank=4)": False,
    "dare_ties(a + b, density=0.5)": False,
    "a": True,
    "2*a + 0.5*b": True,
    "-1*a": True,
}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("text", FUSED)
def test_a_fusion_is_in_the_adapters_dtype_where_that_holds_it(
    tmp_path: Path, dtype: torch.dtype, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_fuse(tmp_path, dtype, text) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    written = load(tmp_path / "out")
    family = {name: load(tmp_path / name) for name in "ab"}
    wanted = dense(fuse(parse(text), family, dtype=torch.float64)[0])
    assert written.dtype == (dtype if FUSED[text] else torch.float32)
    assert largest(written, wanted) <= TOLERANCE
    name = str(dtype).removeprefix("torch.")
    assert (f" in float32, since {name} would change a module's update by up to " in last) != FUSED[text]


@pytest.mark.parametrize("dtype", NARROW)
def test_the_error_of_a_dtype_that_is_asked_for_is_stated(
    tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(dtype).removeprefix("torch.")
    assert run_fuse(tmp_path, dtype, "0.6*a + 0.4*b", "--dtype", name, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    written = load(tmp_path / "out")
    assert written.dtype == dtype
    wanted = dense_sum(parse("0.6*a + 0.4*b"), {name: load(tmp_path / name) for name in "ab"})
    assert content["rounding"] == pytest.approx(largest(written, wanted), rel=1e-2)
    assert torch.finfo(dtype).eps / 10 < content["rounding"] < torch.finfo(dtype).eps
    assert content["dtype"] == name
    card = json.loads((tmp_path / "out" / "fusion.json").read_text())
    assert (card["dtype"], card["rounding"]) == (name, content["rounding"])
    assert content["bytes"] == card["report"]["bytes"] == written.nbytes


def test_strict_refuses_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_fuse(tmp_path, torch.bfloat16, "0.6*a + 0.4*b", "--dtype", "bfloat16", "--strict") == 2
    assert "bfloat16, rounded by up to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run_fuse(tmp_path, torch.bfloat16, "0.6*a + 0.4*b", "--strict") == 0


def test_what_float16_cannot_hold_is_written_in_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(adapter(0, 3, 30000.0, torch.float16), tmp_path / "a")
    assert run_fuse(tmp_path, torch.float16, "16*a") == 0
    assert "since float16 would change a module's update by up to inf" in capsys.readouterr().out
    save(adapter(0, 3, 30000.0, torch.float16), tmp_path / "two" / "a")
    assert run_fuse(tmp_path / "two", torch.float16, "16*a", "--dtype", "float16") == 2
    assert "does not fit into float16: take float32 or bfloat16" in capsys.readouterr().err


def uneven(ratio: float, dtype: torch.dtype) -> LoraAdapter:
    """Modules of one rank, the last at another scaling."""
    modules = adapter(1, dtype=dtype).modules
    scalings = dict.fromkeys(SHAPES, 1.0) | {list(SHAPES)[-1]: ratio}
    return make_adapter({name: LoraModule(m.a, m.b, scalings[name]) for name, m in modules.items()}, BASE)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("ratio", [2.0, 3.0])
def test_one_alpha_for_all_rounds_nothing(tmp_path: Path, ratio: float, dtype: torch.dtype) -> None:
    one = uneven(ratio, dtype)
    padded = to_one_rank(one)
    is_kept = ratio == 2.0
    assert {module.b.dtype for module in padded.modules.values()} == {dtype if is_kept else torch.float32}
    assert largest(padded, dense(one)) <= TOLERANCE
    assert len({module.scaling for module in padded.modules.values()}) == 1
    notes = [note for note in padded.notes if f"in float32, since {str(dtype).removeprefix('torch.')} would" in note]
    assert len(notes) == (not is_kept)
    save(one, tmp_path / "out", one_rank=True)
    assert largest(load(tmp_path / "out"), dense(one)) <= TOLERANCE


@pytest.mark.parametrize("options", [["--one-rank"], ["--one-rank", "--dtype", "bfloat16"], ["--dtype", "float16"], []])
def test_convert_says_what_it_rounds(tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    one = uneven(3.0, torch.bfloat16)
    save(one, tmp_path / "in")
    assert main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *options, "--json"]) == 0
    note = "; ".join(json.loads(capsys.readouterr().out)["notes"])
    written = load(tmp_path / "out")
    error = largest(written, dense(one))
    if "--dtype" not in options:
        assert written.dtype == (torch.float32 if options else torch.bfloat16)
        assert error <= TOLERANCE
        assert ("in float32, since bfloat16 would change" in note) == bool(options)
    else:
        assert str(written.dtype) == f"torch.{options[-1]}"
        assert f"in {options[-1]}, rounded by up to {error:.1e} of a module's update" in note or error <= TOLERANCE


def test_rounding_measures_each_module_and_refuses_what_does_not_fit() -> None:
    one = adapter(3)
    rounded = round_factors(one, torch.bfloat16, one.dtype)
    assert rounded.error == pytest.approx(largest(rounded.adapter, dense(one)), rel=1e-6)
    assert round_factors(one, None, one.dtype).adapter is one
    large = make_adapter({"x": LoraModule(torch.ones(1, 1), torch.full((1, 1), 1e9), 1.0)}, None)
    with pytest.raises(AdapterError, match="does not fit into float16: take float32 or bfloat16"):
        round_factors(large, torch.float16, torch.float32)
