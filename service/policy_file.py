"""The file that `FUSION_POLICY` names: TOML, with the policy's rules and the limits of keys and tenants."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from service.settings import SettingsError, variable
from service.validation import MAX_QUOTED

LIMITS = "limits"
"""The table that is no part of the policy."""


def read_policy_file(path: str) -> dict[str, Any]:
    """All tables of the file at `path`, unchecked; none without a path. SettingsError when it cannot be read."""
    if not path:
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{variable('policy')}={path!r} cannot be read: {error}") from error


def policy_fault(path: str, tables: Mapping[str, Any], error: ValidationError) -> SettingsError:
    """The first fault of the file's tables, with its place: the table, the number or id of the rule, the key."""
    first = error.errors()[0]
    place: list[str] = []
    content: Any = tables
    for part in first["loc"]:
        if isinstance(part, int):
            rule = content[part] if isinstance(content, list) and part < len(content) else None
            known = rule.get("id") if isinstance(rule, dict) else None
            place[-1:] = [f"{place[-1]} {part + 1}" + (f" ({known!r:.{MAX_QUOTED}})" if known else "")]
            content = rule or {}
        else:
            place.append(str(part)[:MAX_QUOTED])
            content = content.get(part, {}) if isinstance(content, Mapping) else {}
    if first["type"] == "unknown_key":
        place.append(str(first["ctx"]["key"])[:MAX_QUOTED])
    message = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first["input"], Mapping | BaseModel) else f", got {first['input']!r:.{MAX_QUOTED}}"
    where = ", ".join(place)
    return SettingsError(f"{variable('policy')}={path!r}{f', {where}' if where else ''}: {message}{value}")
