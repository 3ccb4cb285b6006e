"""The tables of the docs that are made from the code: settings, fusion methods, data formats."""

from adapters import METHODS
from service.settings import describe
from training.config import defaults
from training.rows.readers import FORMATS


def settings() -> str:
    """Every setting of the service."""
    return describe()


def methods() -> str:
    """Every fusion method with its options and source."""
    rows = ["| method | what it computes | options (default) | source |", "| --- | --- | --- | --- |"]
    for method in METHODS.values():
        options = ", ".join(f"`{o.name}` ({'required' if o.default is None else o.default})" for o in method.options)
        text, _, link = method.reference.rpartition("https://")
        source = (
            f"[{text.strip(', ') or link.removesuffix('/')}](https://{link})"
            if "https://" in method.reference
            else link
        )
        rows.append(f"| `{method.name}` | {method.summary} | {options} | {source} |")
    return "\n".join(rows)


def formats() -> str:
    """Every format of training rows."""
    rows = ["| format | a row is |", "| --- | --- |"]
    return "\n".join([*rows, *(f"| `{name}` | `{format.summary}` |" for name, format in FORMATS.items())])


def training_settings() -> str:
    """Every setting of the trainer with its default, as TOML would have it."""
    return "\n".join(["```text", *(f"{key} = {value}" for key, value in defaults()), "```"])
