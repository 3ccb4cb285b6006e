"""The supported vLLM versions, and the check that what this service replaces or reads exists."""

from typing import Any

SUPPORTED_VLLM = ("0.32.0",)


class UnknownVllmError(RuntimeError):
    """This vLLM is not one whose internals this service knows."""


def check_version(version: str) -> None:
    """Raise `UnknownVllmError` unless `version` (a local part such as `+cpu` aside) is a supported one."""
    if version.partition("+")[0] not in SUPPORTED_VLLM:
        raise UnknownVllmError(
            f"vLLM {version!r} is not a version this service knows; expected one of "
            f"{', '.join(SUPPORTED_VLLM)}. Install the pins in requirements/."
        )


def require(owner: Any, *names: str) -> None:
    """Raise `UnknownVllmError` unless `owner`, one of vLLM's modules, classes or objects, has all `names`."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        where = getattr(owner, "__name__", type(owner).__name__)
        raise UnknownVllmError(f"vLLM's {where} has no {', '.join(missing)}: install the pins in requirements/")
