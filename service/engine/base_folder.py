"""Whether a base's folder is whole, seen from its small files before an engine is started for it."""

import json
from collections.abc import Sequence
from pathlib import Path

from adapters.files import LFS_POINTER

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
MAX_HEADER_BYTES = 100 * 2**20
"""Of a safetensors file, by its format."""


class BaseModelError(ValueError):
    """This base cannot be served; the message says why, and what to do."""


def describe_error(error: Exception) -> str:
    """What a library raised for a base, with the type where the text alone says little, as that of a KeyError."""
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


def check_folder(base: str, engine_args: Sequence[str] = ()) -> None:
    """Raise FileNotFoundError or `BaseModelError` when `base`, a folder, cannot be one; hub names are not looked at.

    `engine_args` are vLLM's flags: with `--load-format` the weights need not lie in the folder.
    """
    folder = Path(base)
    if not folder.exists() and not base.startswith((".", "/")):
        return
    if folder.is_file():
        kind = "a GGUF file" if folder.suffix == ".gguf" else "a file"
        raise BaseModelError(
            f"FUSION_BASE={base!r} is {kind}: expected a folder in Hugging Face's format, with config.json, "
            "*.safetensors and the tokenizer"
        )
    if not (folder / "config.json").is_file():
        raise _missing_config(base, folder)
    _check_config(folder / "config.json")
    for path in sorted(file for pattern in ("*.json", *WEIGHTS) for file in folder.glob(pattern)):
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise BaseModelError(
                    f"{str(path)!r} is a Git LFS pointer, not the file itself: run `git lfs pull` in {base!r}"
                )
    if not has_flag(engine_args, "--load-format"):
        _check_weights(folder)


def has_flag(engine_args: Sequence[str], flag: str) -> bool:
    """Whether vLLM's flags have this one, also as `--the_flag` or `--the-flag=value`."""
    return any(given.partition("=")[0].replace("_", "-") == flag for given in engine_args)


def is_quantized(base: str) -> bool:
    """Whether the configuration in this folder names a quantization; False for hub names."""
    try:
        config = json.loads(Path(base, "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "quantization_config" in config


def _missing_config(base: str, folder: Path) -> Exception:
    """The error for a base without a config.json in `folder`, with its likely reason."""
    if (folder / "adapter_config.json").is_file():
        return BaseModelError(
            f"FUSION_BASE={base!r} is a LoRA adapter: name it in FUSION_ADAPTERS=NAME={base}, and the model that it "
            "was trained on in FUSION_BASE"
        )
    if folder.is_dir() and any(folder.iterdir()):
        inside = [path.parent.name for path in sorted(folder.glob("*/config.json"))]
        hint = f"; did you mean {str(folder / inside[0])!r}?" if inside else ""
        return BaseModelError(
            f"FUSION_BASE={base!r} has no config.json: expected a folder in Hugging Face's format{hint}"
        )
    return FileNotFoundError(
        f"no base model in FUSION_BASE={base!r}: `lora-fusion serve` makes the default one, "
        f"and so does `python -m training.base {base}`"
    )


def _check_config(path: Path) -> None:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BaseModelError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise BaseModelError(f"{str(path)!r} has no `model_type`: it is not the configuration of a model")


def _check_weights(folder: Path) -> None:
    """Raise `BaseModelError` when weights are missing or end too early, as a broken download leaves them."""
    files = {path.name: path for pattern in WEIGHTS for path in folder.glob(pattern)}
    if not files:
        raise BaseModelError(f"{str(folder)!r} has no weights: expected *.safetensors beside config.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaseModelError(f"{str(index)!r} cannot be read: {error!r}") from error
        if missing := sorted(shards - files.keys()):
            raise BaseModelError(
                f"{str(folder)!r} lacks {len(missing)} of its {len(shards)} files of weights, the first is "
                f"{missing[0]!r}: download it again"
            )
    for name, path in files.items():
        if name.endswith(".safetensors"):
            _check_length(path)


def _check_length(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        expected = 8 + length
        try:
            if length > MAX_HEADER_BYTES:
                raise ValueError("no header is as long")
            if size >= expected:
                entries = json.loads(file.read(length)).items()
                expected += max(
                    (entry["data_offsets"][1] for name, entry in entries if name != "__metadata__"), default=0
                )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise BaseModelError(f"{str(path)!r} is not in safetensors format: download it again") from error
    if size < expected:
        raise BaseModelError(f"{str(path)!r} ends after {size} bytes, it should have {expected}: download it again")
