"""Gates on disk and what they choose: adapters with a readout, which are never fused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from adapters import AdapterError, FusionError, LoraAdapter, Readout, fuse, load, parse, plan, save
from adapters.cli import main
from adapters.readout import MAX_GATE_BYTES
from tests.adapters.samples import CONFIG, WEIGHTS, adapter, same

READOUT = Readout(yes=9, no=7, scale=1.5, offset=-0.5)


def gate(readout: Readout = READOUT) -> LoraAdapter:
    return replace(adapter(1), gate=readout)


def write(folder: Path, content: object) -> Path:
    """A folder whose key `gate` is `content`."""
    save(gate(), folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"gate": content}))
    return folder


@pytest.mark.parametrize("lazy", [False, True])
def test_a_gate_comes_back_from_its_folder(tmp_path: Path, lazy: bool) -> None:
    save(gate(), tmp_path / "risk")
    loaded = load(tmp_path / "risk", lazy=lazy)
    assert loaded.gate == READOUT
    assert loaded.digest == gate().digest
    assert not loaded.notes
    assert Readout.from_text(READOUT.to_text()) == READOUT


def test_an_adapter_without_the_key_is_no_gate(tmp_path: Path) -> None:
    save(adapter(1), tmp_path / "plain")
    assert load(tmp_path / "plain").gate is None
    assert load(write(tmp_path / "null", None)).gate is None


@pytest.mark.parametrize("changes", [{"yes": 8}, {"no": 8}, {"scale": 1.25}, {"offset": 0.0}])
def test_the_digest_is_of_the_readout_too(changes: dict[str, float]) -> None:
    changed = replace(READOUT, **changes)  # type: ignore[arg-type]  # of the fields' types
    assert len({gate().digest, gate(changed).digest, adapter(1).digest}) == 3


def test_spellings_of_a_number_have_one_digest() -> None:
    assert gate(Readout(9, 7, 1, 0)).digest == gate(Readout(9, 7, 1.0, -0.0)).digest


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "expected an object"),
        ("risk", "'risk'"),
        ({}, "has no yes"),
        ({"yes": 1}, "has no no"),
        ({"yes": 1, "no": 2, "ofset": 1}, "did you mean 'offset'"),
        ({"yes": 1, "no": 2, "layer": 1}, "unknown key 'layer': known are yes, no, scale, offset"),
        ({"yes": 1, "no": 1}, "both 1"),
        ({"yes": -1, "no": 1}, "yes is -1"),
        ({"yes": 1.5, "no": 1}, "yes is 1.5"),
        ({"yes": True, "no": 2}, "yes is True"),
        ({"yes": "1", "no": 2}, "yes is '1'"),
        ({"yes": 1, "no": 2**40}, "no is"),
        ({"yes": 1, "no": 2, "scale": math.nan}, "scale is nan"),
        ({"yes": 1, "no": 2, "offset": math.inf}, "offset is inf"),
        ({"yes": 1, "no": 2, "scale": None}, "scale is None"),
        ({"yes": 1, "no": 2, "scale": "1" * 10**5}, "scale is"),
        ({"yes": 1, "no": 2, "scale": 1e7}, "scale is"),
        ({"yes": [1] * 10**4, "no": 2}, "yes is"),
    ],
)
def test_a_readout_that_is_not_one_is_refused(tmp_path: Path, content: object, says: str) -> None:
    with pytest.raises(AdapterError) as raised:
        load(write(tmp_path / "risk", content))
    assert raised.value.reason == "gate"
    assert says in str(raised.value)
    assert len(str(raised.value)) < 300


def test_a_gate_over_its_size_is_refused(tmp_path: Path) -> None:
    save(gate(), tmp_path / "risk")
    with (tmp_path / "risk" / WEIGHTS).open("ab") as file:
        file.truncate(MAX_GATE_BYTES + 1)
    with pytest.raises(AdapterError, match=f"expected at most {MAX_GATE_BYTES}") as raised:
        load(tmp_path / "risk")
    assert raised.value.reason == "gate"


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    READOUT.check_vocabulary(10)
    with pytest.raises(AdapterError, match="yes is the token 9, but the base has 9"):
        READOUT.check_vocabulary(9)


@pytest.mark.parametrize("carry_out", [fuse, plan])
@pytest.mark.parametrize("recipe", ["risk", "0.5*risk + 1*task", "0*risk + 1*task"])
def test_a_gate_is_never_fused(carry_out: Callable[..., object], recipe: str) -> None:
    with pytest.raises(FusionError, match=r"'risk' is a gate.*by=risk"):
        carry_out(parse(recipe), {"risk": gate(), "task": adapter(2)})


def test_show_says_how_a_gate_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(gate(), tmp_path / "risk")
    assert main(["show", str(tmp_path / "risk"), "--json"]) == 0
    assert Readout(**json.loads(capsys.readouterr().out)["gate"]) == READOUT


def test_saving_in_one_rank_and_renaming_leave_a_gate_a_gate(tmp_path: Path) -> None:
    save(gate(), tmp_path / "risk", one_rank=True)
    loaded = load(tmp_path / "risk")
    assert loaded.gate == READOUT
    assert same(loaded, gate())


BY_RISK = parse("gate(1*task + 0.8*safety, by=risk, safety in 0..0.8, task in 0.2..1)").gate


def test_the_share_lies_between_the_bounds() -> None:
    assert BY_RISK is not None
    assert READOUT.choose(0.5 / 1.5, BY_RISK) == {"safety": 0.4, "task": 0.6}  # in the middle
    assert READOUT.choose(1e300, BY_RISK) == {"safety": 0.8, "task": 1.0}
    assert READOUT.choose(-1e300, BY_RISK) == {"safety": 0.0, "task": 0.2}


@given(st.floats(-50, 50), st.floats(0, 5))
def test_a_higher_value_never_means_a_lower_weight(value: float, more: float) -> None:
    assert BY_RISK is not None
    before, after = READOUT.choose(value, BY_RISK), READOUT.choose(value + more, BY_RISK)
    expected = 0.8 / (1 + math.exp(-(1.5 * value - 0.5)))
    assert before["safety"] == pytest.approx(expected, abs=5.1e-4)
    assert all(after[name] >= before[name] for name in before)
    steps = before["safety"] / 0.8 * 1000
    assert steps == pytest.approx(round(steps), abs=1e-5)


def test_narrow_bounds_are_chosen_within_too() -> None:
    gate = parse("gate(1*a, by=risk, a in 0.9998..1.0002)").gate
    assert gate is not None
    weights = [READOUT.choose(value, gate)["a"] for value in (-9.0, 0.0, 9.0)]
    assert 0.9998 <= weights[0] < weights[1] < weights[2] <= 1.0002


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_error(value: float) -> None:
    assert BY_RISK is not None
    with pytest.raises(ValueError, match="expected a finite number"):
        READOUT.choose(value, BY_RISK)
