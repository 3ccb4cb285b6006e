"""TOML tables into frozen dataclasses: types checked, unknown keys rejected with the nearest known one."""

import dataclasses
import tomllib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from adapters import did_you_mean
from training.errors import ConfigError

T = TypeVar("T")
Tables = dict[str, Any]

_TYPE_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def check(valid: bool, key: str, value: object, expected: str) -> None:
    """ConfigError naming the key, its value and what was expected, unless `valid`."""
    if not valid:
        raise ConfigError(f"{key} is {value!r}: expected {expected}")


def build(cls: type[T], table: Mapping[str, object], where: str = "") -> T:
    """An instance of a dataclass from its table; `where` is the table's own name. ConfigError for an unknown or
    missing key or a wrong type.
    """
    prefix = f"{where}." if where else ""
    fields = {prefix + field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # cls is a dataclass
    for key in (prefix + key for key in table):
        if key not in fields:
            hint = did_you_mean(key, fields) or f"expected one of {', '.join(fields)}"
            raise ConfigError(f"unknown key {key!r}: {hint}")
    for key, field in fields.items():
        if field.name not in table and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"key {key!r} is missing: set it in the recipe, or with --set {key}=VALUE")
    hints = get_type_hints(cls)
    return cls(**{key: convert(value, hints[key], prefix + key) for key, value in table.items()})


def convert(value: object, hint: Any, where: str) -> object:
    """One TOML value as a field's type: integers pass as floats, lists become tuples, tables read-only mappings."""
    origin = get_origin(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}: expected a table [{where}]")
        return build(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} is {value!r}: expected a list")
        inner = get_args(hint)[0]
        return tuple(convert(item, inner, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        check(value in get_args(hint), where, value, f"one of {', '.join(map(str, get_args(hint)))}")
        return value
    if origin is not None and issubclass(origin, Mapping):
        inner = get_args(hint)[1]
        if not isinstance(value, dict):
            example = '{prompt = "question"}' if inner is str else '{"safety.jsonl" = 0.03}'
            raise ConfigError(f"{where} is {value!r}: expected a table such as {example}")
        return MappingProxyType({key: convert(item, inner, f"{where}.{key}") for key, item in value.items()})
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} is {value!r}: expected {_TYPE_NAMES[hint]}")
    return value


def to_plain(value: object) -> object:
    """A dataclass, and those inside it, as dicts that JSON and TOML can write."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return dict(value) if isinstance(value, Mapping) else value


def merge(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> Tables:
    """Both, table by table; where both have a value, that of `overrides`."""
    merged = dict(defaults)
    for key, value in overrides.items():
        lower = merged.get(key)
        merged[key] = merge(lower, value) if isinstance(lower, dict) and isinstance(value, dict) else value
    return merged


def apply_override(tables: Tables, text: str) -> None:
    """Put `TABLE.KEY=VALUE` into the tables; what is not a TOML value is taken as a string."""
    path, equals, value = text.partition("=")
    name, dot, key = path.strip().partition(".")
    if not equals or not dot or not key:
        raise ConfigError(f"--set {text!r}: expected TABLE.KEY=VALUE such as lora.r=16")
    try:
        parsed: object = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    table = tables.setdefault(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"--set {text!r}: {name!r} is not a table in the recipe: expected TABLE.KEY=VALUE")
    table[key] = parsed
