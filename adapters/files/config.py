"""adapter_config.json: PEFT's description of an adapter, read with checks, and written."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from adapters.adapter import LoraAdapter, LoraModule
from adapters.errors import AdapterError, quote

HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Initializations that leave the base's weights unchanged; the others (PiSSA, OLoRA, LoRA-GA, …) change them."""
MAX_KEYS, MAX_PATTERNS, MAX_REPEATS = 4096, 16, 2

UNSUPPORTED_KEYS = (
    ("use_dora", "dora", "DoRA rescales the whole weight"),
    ("lora_bias", "lora_bias", "a bias is not a low-rank update"),
    ("modules_to_save", "modules_to_save", "it carries full copies of base modules"),
    ("trainable_token_indices", "trainable_tokens", "it carries rows of the embedding"),
    ("layer_replication", "layer_replication", "it changes the base's layers"),
    ("fan_in_fan_out", "fan_in_fan_out", "its weights are transposed"),
    ("target_parameters", "target_parameters", "it trains parameters, not linear layers"),
    ("alora_invocation_tokens", "alora", "it is active for some tokens only"),
    ("use_qalora", "qalora", "its A acts on pooled inputs"),
    ("use_bdlora", "bdlora", "its factors are block-diagonal"),
    ("arrow_config", "arrow", "it routes between adapters"),
    ("kasa_config", "kasa", "it changes the base's weights"),
    ("monteclora_config", "monteclora", "its weights are sampled"),
)


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The part of adapter_config.json that decides ranks and scalings."""

    r: int
    alpha: float
    rslora: bool
    ranks: tuple[tuple[re.Pattern[str], int], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    base: str | None

    def rank(self, module: str) -> int:
        """The rank PEFT gives that module: the first `rank_pattern` that matches, else r."""
        return next((rank for pattern, rank in self.ranks if pattern.match(module)), self.r)

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (https://arxiv.org/abs/2312.03732)."""
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.match(module)), self.alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_config(text: bytes) -> LoraConfig:
    """Check the bytes of an adapter_config.json; AdapterError with the reason for anything but plain LoRA."""
    raw = read_object(text, "adapter_config.json")
    if raw.get("peft_type") != "LORA":
        raise AdapterError("not_lora", f"peft_type is {quote(raw.get('peft_type'))}: expected 'LORA'")
    for key, reason, why in UNSUPPORTED_KEYS:
        if raw.get(key):
            raise AdapterError(reason, f"the adapter has {key}={quote(raw[key])}: {why}, so it cannot be fused as LoRA")
    if raw.get("bias") not in (None, "none"):
        raise AdapterError(
            "bias", f"the adapter has bias={quote(raw['bias'])}: expected 'none', a bias cannot be fused"
        )
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in HARMLESS_INITS:
        raise AdapterError(
            "init",
            f"the adapter has init_lora_weights={quote(init)}, which changes the base's weights: "
            "convert it to plain LoRA with PEFT's path_initial_model_for_weight_conversion",
        )
    base = raw.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise AdapterError("bad_config", f"base_model_name_or_path is {quote(base)}: expected a string or null")
    rslora = raw.get("use_rslora", False)
    if not isinstance(rslora, bool | None):
        raise AdapterError("bad_config", f"use_rslora is {quote(rslora)}: expected true or false")
    ranks = _read_patterns(raw.get("rank_pattern"), "rank_pattern")
    alphas = _read_patterns(raw.get("alpha_pattern"), "alpha_pattern")
    return LoraConfig(
        r=_check_rank(raw.get("r", 8), "r"),
        alpha=_check_alpha(raw.get("lora_alpha", 8), "lora_alpha"),
        rslora=bool(rslora),
        ranks=tuple((pattern, _check_rank(value, "rank_pattern")) for pattern, value in ranks),
        alphas=tuple((pattern, _check_alpha(value, "alpha_pattern")) for pattern, value in alphas),
        base=base or None,
    )


def read_object(text: bytes, name: str, reason: str = "bad_config") -> dict[str, object]:
    """A JSON object without repeated keys, NaN or Infinity; AdapterError otherwise."""

    def reject_repeats(items: list[tuple[str, object]]) -> dict[str, object]:
        unique = dict(items)
        if len(unique) < len(items):
            ((repeated, _),) = Counter(key for key, _ in items).most_common(1)
            raise ValueError(f"the key {quote(repeated)} appears twice")
        return unique

    def reject_constant(token: str) -> object:
        raise ValueError(f"{token} is not a JSON number")

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=reject_repeats, parse_constant=reject_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterError(reason, f"{name} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(reason, f"{name} holds {quote(content)}: expected a JSON object")
    return content


def _read_patterns(raw: object, name: str) -> list[tuple[re.Pattern[str], object]]:
    """PEFT's rule: a key matches a module whose name ends with it at a dot. Keys are regular expressions."""
    if raw is None:
        return []
    if not isinstance(raw, dict):
        raise AdapterError("bad_config", f"{name} is {quote(raw)}: expected an object of module name to number")
    # The keys are untrusted: nested or many repeats could keep the matcher busy forever.
    if len(raw) > MAX_KEYS or sum(re.search(r"[*+{]", key) is not None for key in raw) > MAX_PATTERNS:
        raise AdapterError(
            "bad_config", f"{name} has too many keys: expected at most {MAX_KEYS}, with at most {MAX_PATTERNS} patterns"
        )
    return [(_compile_pattern(key, name), value) for key, value in raw.items()]


def _compile_pattern(key: str, name: str) -> re.Pattern[str]:
    if len(key) > 1024 or re.search(r"\)[*+{]", key) or len(re.findall(r"(?<!\\)[*+{]", key)) > MAX_REPEATS:
        raise AdapterError("bad_config", f"{name} has the key {quote(key)}: expected a module name or a simple pattern")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(
            "bad_config", f"{name} has the key {quote(key)}, which is not a valid pattern: {error}"
        ) from error


def _check_rank(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**20:
        raise AdapterError("bad_config", f"{name} gives the rank {quote(value)}: expected a whole number ≥ 1")
    return value


def _check_alpha(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e30:
        raise AdapterError("bad_config", f"{name} gives alpha {quote(value)}: expected a finite number")
    return float(value)


class PeftDetails(TypedDict, total=False):
    """How an adapter was trained, for `save` to state; by default use_rslora is chosen to give back the scalings,
    lora_dropout is 0 and target_modules are the modules' full names.
    """

    use_rslora: bool
    lora_dropout: float
    target_modules: list[str]


def write_config(adapter: LoraAdapter, details: PeftDetails | None = None) -> bytes:
    """The adapter_config.json that PEFT and vLLM read, keys sorted. Patterns name modules in full, so that each
    matches one. ValueError when a module is not among the `target_modules` of `details`.
    """
    details = details or {}
    targets = details.get("target_modules")
    for name in adapter.modules:
        if targets is not None and not any(f".{name}".endswith(f".{target}") for target in targets):
            raise ValueError(f"target_modules is {targets!r}: expected one that ends the module name {name!r}")
    rslora, alphas = _choose_alphas(adapter.modules, details.get("use_rslora"))
    rank = adapter.rank
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "alpha_pattern": {_anchor(n): _as_integer(a) for n, a in alphas.items() if a != alpha},
        "base_model_name_or_path": adapter.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _as_integer(alpha),
        "lora_dropout": details.get("lora_dropout", 0.0),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {_anchor(n): m.rank for n, m in adapter.modules.items() if m.rank != rank},
        "target_modules": sorted(targets or adapter.modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": rslora,
    }
    return to_json(config)


def to_json(content: Mapping[str, object]) -> bytes:
    """Sorted, indented JSON with a final newline."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _anchor(module: str) -> str:
    """A pattern that matches this module alone, also where PEFT looks for suffixes."""
    return "^" + re.escape(module)


def _as_integer(number: float) -> float | int:
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _choose_alphas(modules: Mapping[str, LoraModule], rslora: bool | None) -> tuple[bool, dict[str, float]]:
    """(use_rslora, alpha by module) that give back every scaling to the last bit, or to the nearest if neither form
    does; `rslora` asks for one form.
    """
    forms = (False, True) if rslora is None else (rslora,)
    alphas: dict[bool, dict[str, float]] = {}
    for form in forms:
        divisors = {name: math.sqrt(module.rank) if form else module.rank for name, module in modules.items()}
        alphas[form] = {name: _find_alpha(module.scaling, divisors[name]) for name, module in modules.items()}
        if all(alphas[form][name] / divisors[name] == module.scaling for name, module in modules.items()):
            return form, alphas[form]
    return forms[0], alphas[forms[0]]


def _find_alpha(scaling: float, divisor: float) -> float:
    """The float whose quotient by `divisor` is `scaling`, or the nearest."""
    alpha = scaling * divisor
    near = (float(round(alpha)), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((candidate for candidate in near if candidate / divisor == scaling), alpha)
