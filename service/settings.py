"""Settings, read once from `FUSION_*` variables or a TOML file (`FUSION_CONFIG`), failing loudly."""

import os
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

Mixed = Literal["auto", "required", "off"]
PREFIX = "FUSION_"


class SettingsError(ValueError):
    """A setting is unknown or has a value it cannot have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings; field `max_rank` is `FUSION_MAX_RANK` in the environment, `max_rank` in TOML."""

    base: str = ".cache/base/smollm2-135m-instruct"
    """Folder (or, with a hub, name) of the base model."""
    base_name: str = "smollm2-135m-instruct"
    """Name the base is served as, and that adapters give as their base."""
    base_aliases: tuple[str, ...] = ()
    """Other values of an adapter's `base_model_name_or_path` that mean this base."""
    host: str = "127.0.0.1"
    port: int = 3000
    data: Path = Path(".data")
    """Folder of the registry file and the store."""
    database: str = ""
    """SQLAlchemy URL of the registry; empty means SQLite in `data`."""
    adapters: tuple[str, ...] = ("task=examples/adapters/task", "safety=examples/adapters/safety")
    """NAME=PATH pairs registered at start when the name is free."""
    profiles: tuple[str, ...] = ("balanced=0.6*task + 0.4*safety",)
    """NAME=RECIPE pairs made profiles at start when the name is free (separated by `;`)."""
    groups: tuple[str, ...] = ()
    """Adapters that share one stack: names joined by `+`, e.g. `task+safety`."""
    adapter_roots: tuple[str, ...] = ("examples/adapters",)
    """Folders that `POST /v1/adapters` may read from."""
    mixed: Mixed = "auto"
    """`auto`: mix when proven at start; `required`: refuse to start without; `off`: build every sum."""
    max_weight: float = 16.0
    max_lora_rank: int = 32
    max_loras: int = 2
    max_cpu_loras: int = 16
    strict: bool = False
    """Refuse recipes that lose accuracy, as the request key `strict` does."""
    store_bytes: int = 8 * 2**30
    """Budget of the store of stacks and builds, in bytes."""
    max_upload_bytes: int = 512 * 2**20
    max_names: int = 4096
    """Most adapters, and most profiles."""
    engine_args: tuple[str, ...] = ()
    """vLLM flags passed through, as on its command line."""

    def __post_init__(self) -> None:
        checks = {
            "max_weight": self.max_weight > 0,
            "max_loras": self.max_loras >= 1,
            "max_cpu_loras": self.max_cpu_loras >= max(self.max_loras, 3),
            "port": 0 < self.port < 65536,
            "max_lora_rank": self.max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512),
        }
        for name, good in checks.items():
            if not good:
                raise SettingsError(f"{PREFIX}{name.upper()}={getattr(self, name)!r} is out of range")


_SEPARATORS = {"profiles": ";", "adapters": ",", "groups": ",", "adapter_roots": ":", "base_aliases": ","}


def _value(name: str, kind: Any, raw: Any) -> Any:
    if get_origin(kind) is Literal:
        if raw not in get_args(kind):
            raise ValueError(f"expected one of {', '.join(get_args(kind))}")
        return raw
    if get_origin(kind) is tuple:
        if isinstance(raw, str):
            if name == "engine_args":
                return tuple(shlex.split(raw))
            return tuple(part.strip() for part in raw.split(_SEPARATORS[name]) if part.strip())
        return tuple(str(part) for part in raw)
    if kind is bool:
        known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        return known[str(raw).lower()]
    return kind(raw)


def read(environment: Mapping[str, str] | None = None) -> Settings:
    """Settings from `environment` (default `os.environ`), over the file it names, over the defaults.

    Raises `SettingsError` for unknown names (with the nearest known one) and for bad values.
    """
    env = dict(os.environ if environment is None else environment)
    given: dict[str, Any] = {}
    if path := env.pop(PREFIX + "CONFIG", None):
        try:
            given = tomllib.loads(Path(path).read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise SettingsError(f"{PREFIX}CONFIG={path!r} cannot be read: {error}") from error
    given |= {k.removeprefix(PREFIX).lower(): v for k, v in env.items() if k.startswith(PREFIX)}
    kinds = {f.name: f.type for f in fields(Settings)}
    values = {}
    for name, raw in given.items():
        if name not in kinds:
            near = get_close_matches(name, kinds, 1)
            hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
            raise SettingsError(f"{PREFIX}{name.upper()} is not a setting{hint}")
        try:
            values[name] = _value(name, kinds[name], raw)
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"{PREFIX}{name.upper()}={raw!r} is no {kinds[name]}: {error}") from error
    return Settings(**values)


__all__ = ["Settings", "SettingsError", "read"]
