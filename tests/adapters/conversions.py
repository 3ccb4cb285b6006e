"""What the tests of `lora-fusion convert` share."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.cli import main


def zipped(folder: Path, separator: str = "/") -> Path:
    """A zip of the folder's files beside it."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"checkpoint{separator}{file.name}")
    return path


def check_refusal(
    case: tuple[str, str, Callable[[Path], Path]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command refuses what the case makes, for its reason, with its part of the message, and leaves nothing."""
    reason, part, make = case
    source = make(folder / "in")
    assert main(["convert", str(source), "--out", str(folder / "out")]) == 2
    message = capsys.readouterr().err
    assert part in message
    assert f"[{reason}]" in message
    assert not (folder / "out").exists()
