"""`lora-fusion convert`: pickles are read by a process that can do nothing else, archives by the names in them."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import AdapterError, load, save
from adapters.cli import main
from adapters.convert import convert, pickles, read_source
from tests.adapters.conversions import check_refusal, zipped
from tests.adapters.samples import CONFIG, WEIGHTS, adapter, same

BIN = "adapter_model.bin"


class Call:
    """Pickled, it makes a folder when it is read by what calls anything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def pickled(folder: Path, *, new: bool = True) -> Path:
    """A folder with its weights in a pickle, as torch writes it."""
    save(adapter(1), folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / BIN, _use_new_zipfile_serialization=new)
    return folder


def tarred(folder: Path) -> Path:
    path = folder.with_suffix(".tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "out")
    return path


SOURCES: dict[str, Callable[[Path], Path]] = {
    "A10, a pickle": pickled,
    "A10, an old pickle": lambda folder: pickled(folder, new=False),
    "A10, the pickle itself": lambda folder: pickled(folder) / BIN,
    "A19, a zip": lambda folder: zipped(pickled(folder)),
    "review, a zip of Windows": lambda folder: zipped(pickled(folder), "\\"),
    "A19, a tar.gz": lambda folder: tarred(pickled(folder)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_it_gives_the_same_adapter(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = SOURCES[name](tmp_path / "in")
    assert main(["convert", str(source), "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 3
    assert same(load(tmp_path / "out"), adapter(1))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS}


def test_a_folder_of_safetensors_and_one_rank(tmp_path: Path) -> None:
    ranks = {name: rank for rank, name in enumerate(adapter(1).modules, 2)}
    save(adapter(1, ranks), tmp_path / "in")
    assert same(convert(tmp_path / "in", tmp_path / "out").adapter, adapter(1, ranks))
    convert(tmp_path / "in", tmp_path / "one", one_rank=True)
    assert {facts.rank for facts in load(tmp_path / "one").facts.values()} == {5}


def test_a_pickle_that_calls_something_is_not_obeyed(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "in")
    torch.save({"a": torch.ones(2), "b": Call(tmp_path / "made")}, folder / BIN)
    with pytest.raises(AdapterError, match="cannot be read as tensors alone") as caught:
        convert(folder, tmp_path / "out")
    assert caught.value.reason == "bad_pickle"
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "out").exists()


CONFINED = """
import os, runpy, socket, sys
child = runpy.run_path({child!r})
child["warm_up"]()
child["confine"](2**30)
tries = {{
    "socket": lambda: socket.socket(),
    "read a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "write a file": lambda: os.open({place!r} + "/new", os.O_WRONLY | os.O_CREAT),
    "make a folder": lambda: os.mkdir({place!r} + "/folder"),
    "delete": lambda: os.unlink({place!r} + "/old"),
    "shorten": lambda: os.truncate({place!r} + "/old", 0),
    "rename": lambda: os.rename({place!r} + "/old", {place!r} + "/other"),
    "fork": lambda: os.fork(),
    "run": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(os.getppid(), 0),
}}
for name, attempt in tries.items():
    try:
        attempt()
    except OSError:
        continue
    sys.stdout.write(name + "\\n")
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel refuses calls on Linux only")
def test_the_process_that_reads_pickles_can_do_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("content")
    code = CONFINED.format(child=str(pickles.CHILD), place=str(tmp_path))
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "content"


def with_pickle(content: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pickled(folder)
        torch.save(content, folder / BIN)
        return folder

    return make


def damaged(folder: Path) -> Path:
    pickled(folder)
    (folder / BIN).write_bytes((folder / BIN).read_bytes()[:200])
    return folder


def twice(folder: Path) -> Path:
    pickled(folder)
    shutil.copytree(folder, folder / "checkpoint-5")
    return tarred(folder)


def without_config(folder: Path) -> Path:
    pickled(folder)
    (folder / CONFIG).unlink()
    return folder / BIN


def no_archive(folder: Path) -> Path:
    folder.mkdir()
    (folder / "file.tgz").write_bytes(b"\x1f\x8b" + bytes(50))
    return folder / "file.tgz"


def other_zip(folder: Path) -> Path:
    folder.mkdir()
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    return folder / "a.zip"


REFUSED: dict[str, tuple[str, str, Callable[[Path], Path]]] = {
    "not tensors": ("bad_pickle", "under 'a' it holds int", with_pickle({"a": 1})),
    "a list": ("bad_pickle", "it holds list", with_pickle([torch.ones(1)])),
    "a damaged pickle": ("bad_pickle", BIN, damaged),
    "not LoRA": ("modules_to_save", "full copy", with_pickle({"lm_head.weight": torch.ones(2, 2)})),
    "two adapters": ("bad_archive", "'out/checkpoint-5/", twice),
    "no configuration": ("missing_config", "beside", without_config),
    "no archive": ("bad_archive", "file.tgz", no_archive),
    "an archive of something else": ("bad_archive", CONFIG, other_zip),
    "nothing": ("missing_config", "does not exist", lambda folder: folder / "nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_refusal(REFUSED[name], tmp_path, capsys)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_copies_that_equal_the_base_s_weights_are_left_out(tmp_path: Path, stored: torch.dtype) -> None:
    """A7: PEFT saves whole embeddings after a change of the vocabulary."""
    weights = {f"{name}.weight": torch.randn(6, 4).to(stored) for name in ("model.embed_tokens", "lm_head")}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    folder = tmp_path / "in"
    save(adapter(1), folder)
    copies = {f"base_model.model.{name}": weight.float() for name, weight in weights.items()}
    save_file({**load_file(folder / WEIGHTS), **copies}, folder / WEIGHTS)
    command = ["convert", str(folder), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert main([*command, "--base", str(tmp_path / "base")]) == 0
    assert same(load(tmp_path / "out"), adapter(1))
    configuration = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**configuration, "modules_to_save": ["lm_head"]}))  # review
    assert main([*command[:2], "--out", str(tmp_path / "two"), "--base", str(tmp_path / "base")]) == 0
    assert same(load(tmp_path / "two"), adapter(1))
    copies["base_model.model.lm_head.weight"][0, 0] *= 1 + 1e-5  # review: trained, if by less than bfloat16 can tell
    save_file({**load_file(folder / WEIGHTS), **copies}, folder / WEIGHTS)
    assert main([*command[:2], "--out", str(tmp_path / "three"), "--base", str(tmp_path / "base")]) == 2


@pytest.mark.parametrize(
    ("name", "content"), [("model.safetensors", b"junk"), *[("model.safetensors.index.json", c) for c in (b"{", b"[]")]]
)
def test_a_base_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Review."""
    save(adapter(1), tmp_path / "in")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / name).write_bytes(content)
    command = ["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--base", str(tmp_path / "base")]
    assert main(command) == 2
    assert f"{name} of the base" in capsys.readouterr().err


def test_wrapped_dictionaries_are_read(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "in")
    torch.save({"state_dict": torch.load(folder / BIN), "step": 3}, folder / BIN)
    assert len(read_source(folder).tensors) == 2 * len(adapter(1).modules)


def test_the_child_needs_no_more_than_its_file(tmp_path: Path) -> None:
    """What comes back is what safetensors writes, straight from the file, with a torch that has one thread."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6).reshape(2, 3).T}, buffer)
    (tmp_path / "a.bin").write_bytes(buffer.getvalue())
    pickles.convert_pickle(tmp_path / "a.bin", tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.arange(6).reshape(2, 3).T)
