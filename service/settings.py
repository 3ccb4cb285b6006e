"""Settings, read once from `FUSION_*` variables or a TOML file (`FUSION_CONFIG`), failing loudly."""

import os
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

Mixed = Literal["auto", "required", "off"]
PREFIX = "FUSION_"


class SettingsError(ValueError):
    """A setting is unknown or has a value it cannot have."""


START_FAILURE = "start-failure.txt"
"""In the data folder: why the last start failed, for the process that waits for it."""


def _say(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings; field `max_loras` is `FUSION_MAX_LORAS` in the environment, `max_loras` in TOML."""

    base: str = _say(".cache/base/smollm2-135m-instruct", "folder (or, with a hub, name) of the base model")
    base_name: str = _say("smollm2-135m-instruct", "name the base is served as, and that adapters give as their base")
    base_aliases: tuple[str, ...] = _say(
        (), "other values of an adapter's `base_model_name_or_path` that mean this base, separated by `,`"
    )
    host: str = _say("127.0.0.1", "address to listen on")
    port: int = _say(3000, "port to listen on")
    data: Path = _say(Path(".data"), "folder of the registry file and the store")
    database: str = _say("", "SQLAlchemy URL of the registry; empty: a SQLite file in the data folder")
    adapters: tuple[str, ...] = _say(
        ("task=examples/adapters/task", "safety=examples/adapters/safety"),
        "NAME=PATH pairs registered at start when the name is free, separated by `,`",
    )
    profiles: tuple[str, ...] = _say(
        ("balanced=0.6*task + 0.4*safety",),
        "NAME=RECIPE pairs made profiles at start when the name is free, separated by `;`",
    )
    groups: tuple[str, ...] = _say(
        (), "adapters that share one stack, names joined by `+` (`task+safety`), separated by `,`"
    )
    adapter_roots: tuple[str, ...] = _say(
        ("examples/adapters", "runs"), "folders that `POST /v1/adapters` may read from, separated by `:`"
    )
    mixed: Mixed = _say(
        "auto", "`auto`: mix when proven at start; `required`: do not start otherwise; `off`: build every sum"
    )
    max_weight: float = _say(16.0, "largest size of a weight in a recipe")
    max_lora_rank: int = _say(32, "largest rank of a stack or build: 1, 8, 16, 32, 64, 128, 256, 320 or 512")
    max_loras: int = _say(2, "stacks and builds that can be active in one batch (engine slots)")
    max_cpu_loras: int = _say(16, "stacks and builds the engine keeps in memory")
    strict: bool = _say(False, "refuse recipes that lose accuracy, as the request key `strict` does")
    store_bytes: int = _say(8 * 2**30, "budget of the store of stacks and builds, in bytes; what is in use stays")
    max_upload_bytes: int = _say(512 * 2**20, "largest uploaded adapter, in bytes, packed and unpacked")
    max_names: int = _say(4096, "most adapters, and most profiles")
    engine_args: tuple[str, ...] = _say((), "vLLM flags passed through, as on its command line")

    def __post_init__(self) -> None:
        checks = {
            "max_weight": 0 < self.max_weight < float("inf"),
            "store_bytes": self.store_bytes > 0,
            "max_upload_bytes": self.max_upload_bytes > 0,
            "max_names": self.max_names > 0,
            "max_loras": self.max_loras >= 1,
            "max_cpu_loras": self.max_cpu_loras >= max(self.max_loras, 3),
            "port": 0 < self.port < 65536,
            "max_lora_rank": self.max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512),
        }
        for name in ("adapters", "profiles"):
            for pair in getattr(self, name):
                if not all(pair.partition("=")):
                    raise SettingsError(f"{PREFIX}{name.upper()} has {pair!r}; expected NAME=VALUE")
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


def describe() -> str:
    """All settings as a Markdown table: variable, default, meaning."""

    def shown(name: str, default: Any) -> str:
        if isinstance(default, tuple):
            default = _SEPARATORS.get(name, " ").join(default)
        return f"`{default}`" if str(default) else "(empty)"

    rows = [
        f"| `{PREFIX}{f.name.upper()}` | {shown(f.name, f.default)} | {f.metadata['help']} |" for f in fields(Settings)
    ]
    return "\n".join(["| variable | default | meaning |", "| --- | --- | --- |", *rows])


__all__ = ["START_FAILURE", "Settings", "SettingsError", "describe", "read"]
