"""Folders of adapters on this machine: in the roots that the operator names, or shipped."""

import os
from collections.abc import Collection
from pathlib import Path

from adapters.files import SHIPPED, adapter_path
from service.errors import ApiError
from service.validation import MAX_QUOTED


def find_folder(text: str, adapter_roots: Collection[str]) -> Path:
    """The folder `text` names: in `FUSION_ADAPTER_ROOTS`, symlinks resolved, or `shipped:NAME`; else 400.

    What is outside the roots and what does not exist get one answer. Outside them nothing is looked at.
    """
    if text.startswith(SHIPPED):
        return adapter_path(text)
    roots = [Path(root).resolve() for root in adapter_roots]
    named = Path(os.path.abspath(text)) if "\0" not in text else Path("/")
    spelled = [Path(os.path.abspath(root)) for root in adapter_roots]
    if not any(named.is_relative_to(root) for root in (*roots, *spelled)):
        raise _not_in_roots(text)
    try:
        path = named.resolve(strict=True)
        inside = list(path.iterdir()) if any(path.is_relative_to(root) for root in roots) else None
    except (OSError, ValueError, RuntimeError):
        inside = None
    if inside is None:
        raise _not_in_roots(text)
    for file in inside:
        if file.is_symlink() and not any(root in file.resolve().parents for root in roots):
            message = f"{file.name!r} in {text[:MAX_QUOTED]!r} is a link out of FUSION_ADAPTER_ROOTS."
            raise ApiError(400, message, param="path")
        if not os.access(file, os.R_OK):
            message = f"The server's user may not read {file.name!r} in {text[:MAX_QUOTED]!r}; change its mode."
            raise ApiError(400, message, param="path")
    return path


def _not_in_roots(text: str) -> ApiError:
    message = f"{text[:MAX_QUOTED]!r} is not a folder inside FUSION_ADAPTER_ROOTS; use one there, or upload a .tar."
    return ApiError(400, message, param="path")
