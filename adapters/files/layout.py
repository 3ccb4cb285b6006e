"""The files of an adapter's folder, as PEFT names them, and what to say of a folder without them."""

from collections.abc import Iterable
from pathlib import Path

from adapters.errors import AdapterError, quote

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "fusion.json"
"""Where a fusion comes from; PEFT has no such file."""
PICKLES = ("adapter_model.bin", "adapter_model.pt")
"""The names of weights that are a pickle, which can run code: read by `adapters.convert` alone."""
MERGE_DORA = "`lora-fusion convert --merge-dora BASE`"
MERGE_ALL = "merge it into the base with PEFT's merge_and_unload, and serve the result as FUSION_BASE"
DROP_OR_MERGE = f"if they are as the base has them, `lora-fusion convert --base DIR` leaves them out, else {MERGE_ALL}"
"""The ways out for adapters that are more than LoRA."""
MAX_LISTED = 64
"""How many of a folder's entries are looked at to say what is wrong."""


def reject_weights(place: str, names: Iterable[str]) -> AdapterError:
    """The error for a place with a configuration and these files, but without weights that are read."""
    known = sorted(names)[:MAX_LISTED]
    pickles = [name for name in known if name.startswith("adapter_model") and name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return AdapterError(
            "pickle_only",
            f"{place} has its weights only in {quote(pickles[0])}, a pickle, which can run code: make {WEIGHTS} of it "
            "with `lora-fusion convert FOLDER --out DIR`",
        )
    others = [name for name in known if name.endswith((".safetensors", ".index.json", ".bin", ".gguf"))]
    seen = f"found {', '.join(map(quote, others[:2]))}" if others else "there are no weights at all"
    wanted = "expected a PEFT adapter folder"
    if any("-of-" in name and name.startswith("adapter_model") for name in others):
        wanted = (
            f"neither PEFT nor vLLM reads parts; make {WEIGHTS} of them with `lora-fusion convert FOLDER --out DIR`"
        )
    elif len(others) == 1 and others[0].endswith(".safetensors"):
        wanted = f"if it is the adapter, rename it to {WEIGHTS}"
    return AdapterError("missing_weights", f"{place} has no {WEIGHTS}, {seen}: {wanted}")


def reject_config(folder: Path) -> AdapterError:
    """The error for a folder without a configuration, naming folders in it that have one."""
    # Links are not followed: they may lead out of where the caller may look.
    inner = [path.name for path in _list(folder) if not path.is_symlink() and (path / CONFIG).is_file()]
    if inner:
        names = ", ".join(quote(f"{folder.name}/{name}") for name in sorted(inner)[:3])
        return AdapterError("missing_config", f"{folder.name!r} has no {CONFIG}, but a folder in it has: give {names}")
    if (folder / "config.json").is_file():
        return AdapterError(
            "missing_config", f"{folder.name!r} has no {CONFIG} but a config.json: it is a whole model, not an adapter"
        )
    return AdapterError("missing_config", f"{folder.name!r} has no {CONFIG}: expected a PEFT adapter folder")


def _list(folder: Path) -> list[Path]:
    entries = []
    for path in folder.iterdir():
        entries.append(path)
        if len(entries) == MAX_LISTED:
            break
    return entries
