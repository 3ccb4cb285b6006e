"""The fusion service: OpenAI requests answered by any weighted combination of LoRA adapters.

async with open_service(read_settings()) as service:  # vLLM's engine runs inside
    async with service.pool.lease(service.names.look_up("0.6*task + 0.4*safety")) as lease:
        ...

`python -m service` serves it over HTTP; nothing here imports vLLM, torch or BentoML before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.errors import ApiError
    from service.fusion_service import FusionService
    from service.settings import Settings, SettingsError
    from service.settings import read as read_settings
    from service.startup import open_service

_PLACES = {
    "ApiError": "errors",
    "FusionService": "fusion_service",
    "Settings": "settings",
    "SettingsError": "settings",
    "open_service": "startup",
    "read_settings": "settings:read",
}

__all__ = ["ApiError", "FusionService", "Settings", "SettingsError", "open_service", "read_settings"]


def __getattr__(name: str) -> Any:
    """Import a public name where it is defined, when it is first asked for (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own = _PLACES[name].partition(":")
    return getattr(import_module(f"service.{module}"), own or name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return [*globals(), *__all__]
