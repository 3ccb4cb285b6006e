"""Settings, read once from `FUSION_*` variables or a TOML file (`FUSION_CONFIG`), failing loudly."""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from adapters.recipes import did_you_mean
from service.forms import FORMS, is_form
from service.setting_values import parse_value

Mixed = Literal["auto", "required", "off"]
BaseMatch = Literal["shapes", "name"]
LogFormat = Literal["text", "json"]
PREFIX = "FUSION_"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank."""
CLIENT_KEY = "FUSION_API_KEY"
"""The API key of this project's own clients: a shell may have it that starts a server."""
START_FAILURE = "start-failure.txt"
"""In the data folder: why the last start failed, for the process that waits for it."""


class SettingsError(ValueError):
    """A setting is unknown or has an invalid value."""


_POSITIVE = (
    *("max_loras", "store_bytes", "registry_bytes", "max_upload_bytes", "max_body_bytes", "max_names", "max_requests"),
    *("max_waiting", "wait_timeout_s", "client_timeout_s", "request_timeout_s", "database_timeout_s"),
    *("gate_timeout_s", "source_timeout_s", "loop_timeout_s", "stop_timeout_s"),
)
"""Settings that must be greater than 0."""

_BUCKET = re.compile("s3://[a-z0-9][a-z0-9.-]+(/[A-Za-z0-9._=-]+)*/?")


def _say(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings: field `max_loras` is `FUSION_MAX_LORAS` in the environment, `max_loras` in TOML."""

    base: str = _say(".cache/base/smollm2-135m-instruct", "folder, or hub name, of the base model")
    base_name: str = _say(
        "",
        "name the base is served under, and that adapters declare as their base; empty: the name of the folder in "
        "`FUSION_BASE`, or the hub name there",
    )
    base_aliases: tuple[str, ...] = _say(
        (),
        "other values of an adapter's `base_model_name_or_path` that mean this base, such as the name that it had, "
        "separated by `,`",
    )
    base_match: BaseMatch = _say(
        "shapes",
        "what makes an adapter one of this base: `shapes`: every shape fits, and another name of the base is reported; "
        "`name`: its `base_model_name_or_path` must also name the base; the request key `base_match` overrides it",
    )
    host: str = _say("127.0.0.1", "address to listen on")
    port: int = _say(3000, "port to listen on")
    data: Path = _say(Path(".data"), "folder of the registry file and the store")
    database: str = _say(
        "", "URL of the registry, `postgresql://USER:PASSWORD@HOST/NAME`; empty: a SQLite file in the data folder"
    )
    store: str = _say(
        "",
        "folder that all replicas see, or `s3://BUCKET/FOLDER`, for adapter files, stacks and builds; servers with one "
        "PostgreSQL registry and one such place are replicas of each other; empty: one server alone, with all files in "
        "the data folder",
    )
    adapters: tuple[str, ...] = _say(
        ("task=shipped:task", "safety=shipped:safety", "risk=shipped:risk"),
        "NAME=PATH pairs registered at startup if the name is free, separated by `,`; "
        "`shipped:NAME` is a bundled adapter, a URL one that is fetched from a place in `FUSION_SOURCES`",
    )
    profiles: tuple[str, ...] = _say(
        ("balanced=0.6*task + 0.4*safety",),
        "NAME=RECIPE pairs created as profiles at startup if the name is free, separated by `;`",
    )
    groups: tuple[str, ...] = _say(
        (), "adapters that share one stack, names joined by `+` (`task+safety`), separated by `,`"
    )
    adapter_roots: tuple[str, ...] = _say(
        ("examples/adapters", "runs"), "folders that `POST /v1/adapters` may read from, separated by `:`"
    )
    sources: tuple[str, ...] = _say(
        (),
        "places that adapters may be fetched from, separated by `,`, as `hf://owner/`, `s3://bucket/folder/`, "
        "`https://host/path/`; empty: folders and uploads alone",
    )
    source_networks: tuple[str, ...] = _say(
        (), "internal networks, as `10.0.0.0/8`, whose addresses sources may have, separated by `,`"
    )
    source_credentials: str = _say(
        "", "TOML file with the credentials of sources, and of the bucket in `FUSION_STORE`, read again for each fetch"
    )
    source_timeout_s: float = _say(
        30.0, "how long a source may take to answer, and to send the next 64 KiB, before it is tried again, in seconds"
    )
    max_fetches: int = _say(
        4, "sources that are fetched at once, 2 or more, of which one client may have three quarters; others wait"
    )
    mixed: Mixed = _say(
        "auto", "`auto`: mix if proven at startup; `required`: do not start otherwise; `off`: build every sum"
    )
    max_weight: float = _say(16.0, "largest absolute value of a weight in a recipe")
    max_lora_rank: int = _say(32, "largest rank of a stack or build: 1, 8, 16, 32, 64, 128, 256, 320 or 512")
    max_loras: int = _say(2, "stacks and builds that can be active in one batch (engine slots)")
    max_cpu_loras: int = _say(
        16, "stacks and builds the engine keeps in memory: at least 3, and at least `FUSION_MAX_LORAS`"
    )
    strict: bool = _say(False, "reject recipes that lose accuracy, as the request key `strict` does")
    store_bytes: int = _say(
        8 * 2**30, "budget of the store of stacks and builds, in bytes; entries in use are never evicted"
    )
    max_upload_bytes: int = _say(512 * 2**20, "largest uploaded adapter, in bytes, as sent and unpacked")
    max_names: int = _say(4096, "maximum number of adapters, and of profiles")
    registry_bytes: int = _say(
        256 * 2**20, "budget of what clients keep in the registry: profile versions and scorecards, in bytes"
    )
    model_forms: tuple[str, ...] = _say(
        (),
        "forms of names that `/v1/models` and the metrics list besides the names, for routers that match them exactly, "
        "separated by `,`: `versions` (`profile@3`), `aliases` (`base:name`), `publishers/NAMESPACE` "
        "(`publishers/NAMESPACE/models/name`); all are answered anyway",
    )
    fairness_id: bool = _say(
        False,
        "take clients apart by `x-llm-d-inference-fairness-id` as well; only where all requests come through a router "
        "that sets it",
    )
    objectives: tuple[str, ...] = _say(
        (),
        "NAME=PRIORITY pairs, separated by `,`: requests whose `x-llm-d-inference-objective` has a larger one, from "
        "-9999 to 9999, are computed first; others have 0; only where all requests come through a router that sets it",
    )
    client_templates: bool = _say(False, "allow profiles to set `defaults.chat_template`")
    allowed_hosts: tuple[str, ...] = _say(
        (),
        "names that a request's `Host` may have besides IP addresses and `localhost`, separated by `,`; `*` allows any "
        "name; if empty, no other name is allowed while `FUSION_HOST` is a loopback address, and any name otherwise",
    )
    keyless: bool = _say(
        False, "listen on other addresses than loopback without any API key, so that everybody may do everything"
    )
    policy: str = _say(
        "", "TOML file with the policy on combinations, and the limits of keys and tenants; empty: none of both"
    )
    receipt_key: str = _say(
        "", "file with the key that signs receipts, made by `lora-fusion verify --make-key FILE`; empty: no receipts"
    )
    log_format: LogFormat = _say(
        "text", "`json`: one object a line, and one line for each request, without prompts, answers and secrets"
    )
    public_metrics: bool = _say(False, "answer `/metrics` without the API key")
    max_body_bytes: int = _say(2 * 2**20, "largest body of a request other than an upload, in bytes")
    max_requests: int = _say(
        512, "requests in progress, of which one client may have three quarters; more are answered 429"
    )
    max_waiting: int = _say(128, "requests that wait for a stack or a build; more are answered 503")
    max_client_places: int = _say(
        0,
        "stacks and builds that one client (API key, else address) may hold or wait for at once; more are answered "
        "429; 0: three quarters of `FUSION_MAX_CPU_LORAS`",
    )
    wait_timeout_s: float = _say(
        30.0,
        "how long a request waits for its stack or build, and then for a slot of the batch, before it is answered 503, "
        "in seconds",
    )
    client_timeout_s: float = _say(
        30.0,
        "how long a client may take to send a request's head, the next part of its body, or to read the next part of "
        "an answer, in seconds",
    )
    request_timeout_s: float = _say(3600.0, "how long an answer may take from first to last byte, in seconds")
    gate_timeout_s: float = _say(
        10.0, "how long a gate may take to choose a prompt's weights before the recipe's own are used, in seconds"
    )
    database_timeout_s: float = _say(5.0, "how long the registry's database may take for one call, in seconds")
    loop_timeout_s: float = _say(
        30.0,
        "how long the worker's event loop may stand still before it is killed and started afresh, in seconds; an "
        "engine that answers nothing for 10 times as long is replaced",
    )
    drain_s: float = _say(
        0.0,
        "how long the server still takes requests after SIGTERM, while its health checks say 503, before it begins to "
        "stop, in seconds; longer than a router takes to notice",
    )
    stop_timeout_s: float = _say(
        30.0,
        "how long the server may take to stop before its processes are killed, in seconds; requests in flight get "
        "this time less 10 s, but at least half of it",
    )
    engine_args: tuple[str, ...] = _say((), "vLLM flags passed through, as on its command line")

    @property
    def client_places(self) -> int:
        """`max_client_places`, its 0 resolved."""
        return self.max_client_places or max(1, self.max_cpu_loras * 3 // 4)

    @property
    def registry_url(self) -> str:
        """`database`, its default resolved."""
        return self.database or f"sqlite:///{(self.data / 'registry.sqlite').resolve()}"

    def __post_init__(self) -> None:
        if not self.base_name:
            is_folder = self.base.startswith((".", "/")) or Path(self.base).is_dir()
            object.__setattr__(
                self, "base_name", os.path.basename(os.path.abspath(self.base)) if is_folder else self.base
            )
        slots = max(self.max_loras, 3)
        ranges = {
            "max_weight": (0 < self.max_weight < float("inf"), "a positive finite number"),
            "drain_s": (0 <= self.drain_s < float("inf"), "0 or more"),
            "max_client_places": (self.max_client_places >= 0, "0 or more"),
            "max_cpu_loras": (self.max_cpu_loras >= slots, f"{slots} or more (at least FUSION_MAX_LORAS, at least 3)"),
            "max_fetches": (self.max_fetches >= 2, "2 or more"),
            "port": (0 < self.port < 65536, "1 to 65535"),
            "max_lora_rank": (self.max_lora_rank in LORA_RANKS, f"one of {', '.join(map(str, LORA_RANKS))}"),
        }
        for name in _POSITIVE:
            ranges[name] = (0 < getattr(self, name) < float("inf"), "more than 0")
        if self.store and not self.database.startswith("postgres"):
            needed = "a postgresql:// URL, which replicas need"
            raise SettingsError(f"{variable('store')} is set, but {variable('database')} is not {needed}")
        if "://" in self.store and not _BUCKET.fullmatch(self.store):  # not shown: it may hold a password
            raise SettingsError(f"{variable('store')}: expected a folder, or s3://BUCKET/FOLDER")
        for host in self.allowed_hosts:
            if host != "*" and not re.fullmatch(r"[A-Za-z0-9._-]+", host):
                raise SettingsError(f"{variable('allowed_hosts')} has {host!r}: expected a name without port, or '*'")
        for form in self.model_forms:
            if not is_form(form):
                raise SettingsError(f"{variable('model_forms')} has {form!r}: expected {' or '.join(FORMS)}")
        for pair in self.objectives:
            if not re.fullmatch(r"[^=]+=-?\d{1,4}", pair):
                raise SettingsError(f"{variable('objectives')} has {pair!r}: expected NAME=PRIORITY, -9999 to 9999")
        for name in ("adapters", "profiles"):
            for pair in getattr(self, name):
                if not all(pair.partition("=")):
                    raise SettingsError(f"{variable(name)} has {pair!r}: expected NAME=VALUE")
        for name, (valid, expected) in ranges.items():
            if not valid:
                raise SettingsError(f"{variable(name)}={getattr(self, name)!r}: expected {expected}")

    @property
    def priorities(self) -> dict[str, int]:
        """The priority of each objective."""
        return {name: int(number) for name, _, number in (pair.rpartition("=") for pair in self.objectives)}


_SECRETS = ("database", "engine_args")
"""Settings that may hold a password or an API key, which no log may."""


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def read_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Settings from `environment` (default `os.environ`), over the file it names, over the defaults.

    Raises `SettingsError` for unknown names (with the nearest known one) and for invalid values.
    """
    env = dict(os.environ if environment is None else environment)
    env.pop(CLIENT_KEY, None)
    given: dict[str, Any] = {}
    if path := env.pop(PREFIX + "CONFIG", None):
        try:
            given = tomllib.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise SettingsError(f"{PREFIX}CONFIG={path!r} cannot be read: {error}") from error
    given |= {k.removeprefix(PREFIX).lower(): v for k, v in env.items() if k.startswith(PREFIX)}
    kinds = {f.name: f.type for f in fields(Settings)}
    values = {}
    for name, raw in given.items():
        if name not in kinds:
            near = did_you_mean(name.upper(), map(str.upper, kinds)).replace("'", f"'{PREFIX}", 1)
            hint = near or "`lora-fusion settings` lists all settings"
            raise SettingsError(f"{variable(name)} is not a setting; {hint}")
        try:
            values[name] = parse_value(name, kinds[name], raw)
        except ValueError as error:
            shown = "..." if name in _SECRETS else f"{raw!r}"
            raise SettingsError(f"{variable(name)}={shown}: expected {error}") from error
    return Settings(**values)
