"""What is said to the hosts of sources: a TOML file of tables, each named by the place it is for."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.errors import ApiError
from service.settings import SettingsError
from service.sources.locations import Place, parse_place

SETTING = "FUSION_SOURCE_CREDENTIALS"
KEYS = {
    "hf": {"token", "endpoint"},
    "oci": {"token", "username", "password", "endpoint"},
    "https": {"token", "username", "password"},
    "http": {"token", "username", "password"},
}
"""What a table may hold; those of buckets hold what obstore's stores take."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one place wants to hear; never shown."""

    token: str = field(default="", repr=False)
    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    endpoint: str = ""
    """Where the place is asked for instead of at its usual host."""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Further keys, of buckets alone."""


def read_credentials(file: str) -> dict[Place, Credentials]:
    """The tables of `file`, none without one; `SettingsError` when it cannot be read or has a key that is not known,
    without its values.
    """
    if not file:
        return {}
    try:
        tables = tomllib.loads(Path(file).read_text())
    except (OSError, ValueError) as error:  # of TOML's errors, the message quotes at most one character
        raise SettingsError(f"{SETTING}={file!r} cannot be read: {error}") from error
    found = {}
    for text, table in tables.items():
        try:
            place = parse_place(text)
        except ApiError as error:
            raise SettingsError(f"{SETTING} has the table {text!r}: {error}") from None
        if not isinstance(table, dict):
            raise SettingsError(f"{SETTING} has {text!r}: expected a table, as [{text!r}]")
        known = KEYS.get(place.scheme)
        if known is not None and (strange := table.keys() - known):
            raise SettingsError(
                f"{SETTING} has {min(strange)!r} in the table {text!r}: expected {', '.join(sorted(known))}"
            )
        own = {key: str(value) for key, value in table.items() if key in KEYS["oci"]}
        found[place] = Credentials(**own, options={key: value for key, value in table.items() if key not in own})
    return found


def find_credentials(known: Mapping[Place, Credentials], place: Place) -> Credentials:
    """Those of the narrowest place that holds `place`."""
    holders = [other for other in known if other.holds(place)]
    return known[max(holders, key=lambda other: (bool(other.host), len(other.path)))] if holders else Credentials()
