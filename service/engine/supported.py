"""The supported vLLM versions, and the check that what this service replaces or reads exists."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Version:
    """What is known of one of vLLM's releases, and what it calls otherwise."""

    unproven: str | None
    """Why this service is not known to run on it, or None: its tests do."""
    cli: str
    """The module with its command line."""


VERSIONS = {
    "0.32.0": Version(None, "vllm.entrypoints.launchers.cli_args"),
    "0.33.0": Version("its sources were read, and it has not been run", "vllm.entrypoints.common.cli_args"),
}
"""The next release is tried with a row here, after `python -m requirements.vllm_names` finds all names in its wheel."""
SUPPORTED_VLLM = tuple(VERSIONS)


class UnknownVllmError(RuntimeError):
    """This vLLM is not one whose internals this service knows."""


def public_version(version: str) -> str:
    """`version` without its local part, such as `+cpu`."""
    return version.partition("+")[0]


def check_version(version: str) -> None:
    """Raise `UnknownVllmError` unless `version` (a local part such as `+cpu` aside) is a supported one."""
    if public_version(version) not in SUPPORTED_VLLM:
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
