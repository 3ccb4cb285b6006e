"""Families of bases, each on a server of its own: served log-probabilities equal transformers + PEFT.

`make soak` runs all of them and writes benchmarks/results/bases.json; every run has GPT-NeoX, whose layers are fused in
the base, and which vLLM serves through transformers' own code.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import vllm

from tests.conftest import ROOT
from tests.service.families import (
    FAMILIES,
    QUANTIZED,
    VISION,
    Family,
    change_inputs,
    make_adapters,
    make_base,
    make_reference,
)
from tests.service.quantized import FORMATS, UNSERVED, quantize_base, round_fp8
from tests.service.serving import NAME, TORCHVISION, compare

RESULT = ROOT / "benchmarks/results/bases.json"
TOLERANCE = 1e-4
MIN_EFFECT = 100 * TOLERANCE
"""What each adapter must change at least, or the comparison could not tell it from the base."""
LOW_PRECISION = 0.05
"""Of what an adapter changes, the share by which quantized bases, computed in bfloat16, may be off."""
SERVED = [name for name in FAMILIES if name != "Falcon"]


def serve_family(family: Family, folder: Path, engine: str = "--dtype float32", site: str = "") -> dict[str, float]:
    """What `compare` finds on a random base of this family with two random adapters."""
    base = make_base(family, folder / "base")
    adapters = make_adapters(base, NAME, family, folder / "adapters")
    return compare(base, adapters, make_reference(base, adapters, family), folder, engine, site)


def record(kind: str, name: str, result: dict[str, float]) -> None:
    """Write a row of the table that docs/bases.md shows."""
    content: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    row = result | {"date": f"{datetime.now(UTC):%Y-%m-%d}", "vllm": vllm.__version__, "command": "make soak"}
    content.setdefault(kind, {})[name] = row
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


def assert_exact(result: dict[str, float]) -> None:
    assert result["effect"] > MIN_EFFECT
    assert max(result["base"], result["mixed"], result["built"]) < TOLERANCE, result


def test_a_family_is_served_as_peft_computes_it(tmp_path: Path) -> None:
    assert_exact(serve_family(FAMILIES["GPT-NeoX"], tmp_path))


@pytest.mark.soak
@pytest.mark.parametrize("name", SERVED)
def test_every_family_is_served_as_peft_computes_it(name: str, tmp_path: Path) -> None:
    result = serve_family(FAMILIES[name], tmp_path)
    record("families", name, result)
    assert_exact(result)


@pytest.mark.soak
@pytest.mark.parametrize("name", VISION)
def test_adapters_act_on_the_language_model_of_a_base_that_sees(name: str, tmp_path: Path) -> None:
    result = serve_family(VISION[name], tmp_path, "--dtype float32 --language-model-only", TORCHVISION)
    record("vision", name, result)
    assert_exact(result)


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in UNSERVED])
def test_a_quantized_base_is_served_as_its_plain_weights(name: str, tmp_path: Path) -> None:
    whole = make_base(QUANTIZED, tmp_path / "whole")
    base, plain = quantize_base(whole, name, tmp_path)
    adapters = make_adapters(plain, NAME, QUANTIZED, tmp_path / "adapters")
    reference = make_reference(plain, adapters, QUANTIZED)
    if name.startswith("FP8"):
        change_inputs(reference, round_fp8)
    result = compare(base, adapters, reference, tmp_path, "--dtype bfloat16")
    record("quantized", name, result)
    assert max(result["base"], result["mixed"], result["built"]) < LOW_PRECISION * result["effect"], result
