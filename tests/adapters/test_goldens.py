"""What every method gave when its version was set: bytes of sums anywhere, updates of the others to 1e-6.

`python -m tests.adapters.test_goldens` writes goldens.json anew; a changed number needs a new `version` in the method's
row, since stored builds are named by it.
"""

import hashlib
import json
import math
import tempfile
from pathlib import Path

import pytest
import torch

from adapters import LoraAdapter, LoraModule, fuse, make_adapter, parse, save
from adapters.recipes.methods import METHODS
from tests.adapters.samples import BASE, SHAPES

FILE = Path(__file__).with_name("goldens.json")
ROLES = {"slerp": ", t=0.3, from=a", "safe_merge": ", safety=b, threshold=0.9", "safe_project": ", direction=b"}
BYTES = ("0.6*a + -0.4*b", "1*a + 1*b + 0.5*c", "0.5*a + ramp(0.1..0.9)*c", "a")


def plain(seed: int, rank: int, dtype: torch.dtype = torch.float32) -> LoraAdapter:
    """Factors from whole numbers, the same on every machine."""
    modules = {}
    for i, (name, (d_out, d_in)) in enumerate(SHAPES.items()):
        a = ((torch.arange(rank * d_in) * (seed * 37 + 11) + i) % 101 - 50) / 64
        b = ((torch.arange(rank * d_out) * (seed * 53 + 7) + 3 * i) % 97 - 48) / 64
        modules[name] = LoraModule(a.view(rank, d_in).to(dtype), b.view(d_out, rank).to(dtype), 2.0 / seed)
    return make_adapter(modules, BASE)


FAMILY = {"a": plain(1, 3), "b": plain(2, 4), "c": plain(3, 2, torch.bfloat16)}


def recipe(method: str) -> str:
    """One that the method takes, dropping something where it can."""
    row = METHODS[method]
    terms = "1*a" if row.terms[1] == 1 or method in ("safe_merge", "safe_project") else "0.6*a + 0.4*b"
    names = {option.name for option in row.options}
    settings = ", density=0.6" * ("density" in names) + ", rank=3" * (method.endswith("svd"))
    return f"{method}({terms}{settings}{ROLES.get(method, '')})" if method != "sum" else terms


def fingerprint(adapter: LoraAdapter) -> list[float]:
    """Per module: ‖ΔW‖ and xᵀ·ΔW·y for fixed x, y."""
    found = []
    for name in adapter.modules:
        delta = adapter.delta(name).double()
        x = torch.cos(torch.arange(delta.shape[0], dtype=torch.float64))
        y = torch.sin(torch.arange(delta.shape[1], dtype=torch.float64) + 1)
        found += [float(delta.norm()), float(x @ delta @ y)]
    return found


def digest(text: str, folder: Path) -> str:
    """sha256 of both files that the sum is saved as."""
    save(fuse(parse(text), FAMILY)[0], folder)
    content = b"".join((folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))
    return hashlib.sha256(content).hexdigest()


def test_every_method_has_a_golden_of_its_version() -> None:
    known = json.loads(FILE.read_text())["methods"]
    assert {name: row["version"] for name, row in known.items()} == {n: m.version for n, m in METHODS.items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_gives_what_it_gave(method: str) -> None:
    golden = json.loads(FILE.read_text())["methods"][method]
    fused, _ = fuse(parse(golden["recipe"]), FAMILY)
    size = math.hypot(*golden["fingerprint"][::2])
    assert fingerprint(fused) == pytest.approx(golden["fingerprint"], rel=0, abs=2e-6 * size)


@pytest.mark.parametrize("text", BYTES)
def test_sums_are_the_same_bytes_anywhere(text: str, tmp_path: Path) -> None:
    assert digest(text, tmp_path / "out") == json.loads(FILE.read_text())["bytes"][text]


def main() -> None:
    """Write goldens.json."""
    methods = {}
    for name, row in METHODS.items():
        text = recipe(name)
        made = fingerprint(fuse(parse(text), FAMILY)[0])
        methods[name] = {"version": row.version, "recipe": text, "fingerprint": made}
    with tempfile.TemporaryDirectory() as folder:
        made_bytes = {text: digest(text, Path(folder) / str(i)) for i, text in enumerate(BYTES)}
    FILE.write_text(json.dumps({"methods": methods, "bytes": made_bytes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
