"""What is installed: every file by its hash, listed for others, and refused when it is another one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SETS = sorted(path.name for path in (ROOT / "requirements").glob("*.txt") if not path.name.startswith("overrides"))
PIN = re.compile(r"([a-z0-9][a-z0-9.-]*)==(\S+)((?: --hash=sha256:[0-9a-f]{64})+)")


def read_pins(name: str) -> dict[str, str]:
    """Version of each package of a set; fails on a line that is not a version with its hashes."""
    text = (ROOT / "requirements" / name).read_text().replace(" \\\n   ", "")
    matches = {line: PIN.fullmatch(line) for line in text.splitlines()[1:]}
    assert [line[:80] for line, match in matches.items() if match is None] == []
    return {match[1]: match[2] for match in matches.values() if match}


@pytest.mark.parametrize("name", SETS)
def test_every_package_of_a_set_has_a_version_and_hashes(name: str) -> None:
    assert read_pins(name)


def test_sets_agree_on_what_they_share() -> None:
    runtime, dev = read_pins("runtime.txt"), read_pins("dev.txt")
    assert {name: dev.get(name) for name in runtime} == runtime


def install(folder: Path, pins: str) -> subprocess.CompletedProcess[str]:
    """Install one package, whose line is `pins`, as `make setup` does."""
    first = (ROOT / "requirements/runtime.txt").read_text().partition("\n")[0]
    (folder / "pins.txt").write_text(f"{first}\n{pins}\n")
    command = [sys.executable, "requirements/install.py", str(folder / "venv"), str(folder / "pins.txt")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_package_with_another_hash_is_not_installed(tmp_path: Path) -> None:
    digest = "0" * 64
    refused = install(tmp_path, f"six==1.17.0 --hash=sha256:{digest}")
    assert refused.returncode != 0
    assert digest in refused.stderr
    refused = install(tmp_path, "six==1.17.0")
    assert refused.returncode != 0
    assert "hash" in refused.stderr
    assert not list(tmp_path.glob("venv/lib/*/site-packages/six.py"))


def test_a_set_for_another_interpreter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pins.txt").write_text("# CPython 3.8 on m68k\n")
    command = [sys.executable, "requirements/install.py", ".venv", str(tmp_path / "pins.txt")]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "is for CPython 3.8 on m68k" in refused.stderr
    assert "make lock" in refused.stderr


def test_the_bill_of_materials_lists_what_is_installed_to_serve() -> None:
    subprocess.run(["make", "sbom"], cwd=ROOT, check=True, capture_output=True)
    bill = json.loads((ROOT / "sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert {part["name"]: part["version"] for part in bill["components"]} == read_pins("runtime.txt")
