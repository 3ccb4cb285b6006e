"""The adapters that ship with this project: `shipped:NAME` wherever a path to one is expected."""

from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from adapters.errors import AdapterError, quote

SHIPPED = "shipped:"
CHECKOUT = Path(__file__).resolve().parents[2] / "examples" / "adapters"
INSTALLED = "lora_fusion"
"""The installed package that holds the same folders as data, under `adapters`."""


def adapter_path(text: str) -> Path:
    """The folder that `text` names: a path, or `shipped:NAME`; AdapterError when nothing of that name ships."""
    return shipped_adapter(text.removeprefix(SHIPPED)) if text.startswith(SHIPPED) else Path(text)


def shipped_adapter(name: str) -> Path:
    """The folder of the shipped adapter `name`, in a checkout or an installed package."""
    folders = _folders()
    if name not in folders:
        known = ", ".join(f"{SHIPPED}{known}" for known in sorted(folders)) or "none (this package has none)"
        raise AdapterError("shipped", f"no bundled adapter is named {quote(SHIPPED + name)}: expected one of {known}")
    return folders[name]


def _folders() -> dict[str, Path]:
    roots = [CHECKOUT]
    with suppress(ModuleNotFoundError):  # a checkout, or a Bento, that is not installed
        roots.append(Path(str(files(INSTALLED))) / "adapters")
    folders: dict[str, Path] = {}
    for root in roots:
        for config in root.glob("*/adapter_config.json"):
            folders.setdefault(config.parent.name, config.parent)
    return folders
