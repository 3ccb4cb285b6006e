"""adapter_config.json: PEFT's description of an adapter, read with checks, and written."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Generic, TypedDict, TypeVar

from adapters.adapter import LoraAdapter, LoraModule
from adapters.errors import AdapterError, quote
from adapters.files.experts import read_parameters
from adapters.files.json_text import MAX_NOTES, note_repeated, read_object, to_json
from adapters.files.layout import CONFIG, DROP_OR_MERGE, MERGE_ALL, MERGE_DORA
from adapters.files.matcher import PatternTable
from adapters.files.targets import Targets, read_targets
from adapters.files.weight_range import WEIGHT_RANGE, read_range
from adapters.readout import Readout

Number = TypeVar("Number", int, float)

HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Initializations that leave the base's weights unchanged when an adapter is loaded."""
CHANGING_INITS = ("pissa", "olora", "corda", "loftq")
"""Beginnings of those that change them: the saved factors are of the changed base."""
CONVERT_INIT = "convert it to plain LoRA with PEFT's path_initial_model_for_weight_conversion"
MAX_KEYS, MAX_KEY_CHARS = 4096, 2**19
"""How many keys a pattern object has, and how many characters all of them."""
MAX_BASE_CHARS = 1024
BIASES = ("none", "all", "lora_only")
"""What PEFT trains besides the factors; without a tensor of a bias, all are the same."""

UNSUPPORTED_KEYS = (
    ("use_dora", "dora", f"DoRA rescales the whole weight; for the nearest LoRA, run {MERGE_DORA}"),
    ("modules_to_save", "modules_to_save", f"it carries full copies of base modules; {DROP_OR_MERGE}"),
    ("trainable_token_indices", "trainable_tokens", f"it carries rows of the embedding; {MERGE_ALL}"),
    ("layer_replication", "layer_replication", "it changes the base's layers"),
    ("alora_invocation_tokens", "alora", "it is active for some tokens only"),
    ("use_qalora", "qalora", "its A acts on pooled inputs"),
    ("use_bdlora", "bdlora", "its factors are block-diagonal"),
    ("arrow_config", "arrow", "it routes between adapters"),
    ("kasa_config", "kasa", "it changes the base's weights"),
    ("monteclora_config", "monteclora", "its weights are sampled"),
)
ANSWER_ONLY = "answer_only"
"""Our own key: true when the adapter acts on the answer alone (see `LoraAdapter`)."""
DEFAULT = 8
"""PEFT's r and lora_alpha where the configuration has none."""
KNOWN_KEYS = frozenset(
    {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights", "peft_type"),
        *("base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("target_parameters", "fan_in_fan_out", "lora_dropout", "task_type", "inference_mode", "revision"),
        *(
            "lora_bias",
            "auto_mapping",
            "peft_version",
            "runtime_config",
            "megatron_config",
            "megatron_core",
            "loftq_config",
            ANSWER_ONLY,
            WEIGHT_RANGE,
        ),
        "gate",  # ours
        *("eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "ensure_weight_tying"),
    }
)
"""PEFT's keys that are read here, or do not matter once the adapter is trained; and our own."""


@dataclass(frozen=True, slots=True)
class Overrides(Generic[Number]):
    """A number for each module: that of the first pattern that matches its name, else `default`."""

    default: Number
    patterns: PatternTable
    numbers: tuple[Number, ...]

    def find(self, module: str) -> Number:
        """The number of one module; AdapterError 'bad_config' when the patterns take too long to match."""
        index = self.patterns.find(module) if self.numbers else None
        return self.default if index is None else self.numbers[index]


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The part of adapter_config.json that decides ranks and scalings, by module as PEFT reads them."""

    ranks: Overrides[int]
    alphas: Overrides[float]
    rslora: bool
    base: str | None
    bias: str
    targets: Targets
    notes: tuple[str, ...]
    answer_only: bool = False
    parameters: tuple[str, ...] = ()
    """Parameters of experts that it trains as one, without the experts' name."""
    gate: Readout | None = None
    weight_range: tuple[float, float] | None = None

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (https://arxiv.org/abs/2312.03732)."""
        alpha, rank = self.alphas.find(module), self.ranks.find(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_config(text: bytes) -> LoraConfig:
    """Check the bytes of an adapter_config.json; AdapterError with the reason for anything but plain LoRA."""
    repeated: list[str] = []
    raw = read_object(text, "adapter_config.json", repeated)
    if raw.get("peft_type") != "LORA":
        raise AdapterError("not_lora", f"peft_type is {quote(raw.get('peft_type'))}: expected 'LORA'")
    for key, reason, why in UNSUPPORTED_KEYS:
        if raw.get(key):
            raise AdapterError(reason, f"the adapter has {key}={quote(raw[key])}, which cannot be fused as LoRA: {why}")
    bias = raw.get("bias") or "none"
    if bias not in BIASES:
        raise AdapterError("bad_config", f"bias is {quote(bias)}: expected one of {', '.join(map(repr, BIASES))}")
    _check_init(raw.get("init_lora_weights"))
    base = raw.get("base_model_name_or_path")
    if base is not None and not (isinstance(base, str) and base.isprintable() and len(base) <= MAX_BASE_CHARS):
        raise AdapterError(
            "bad_config",
            f"base_model_name_or_path is {quote(base)}: expected null or at most {MAX_BASE_CHARS} printable characters",
        )
    return LoraConfig(
        ranks=_read_overrides(raw, "r", "rank_pattern", _check_rank),
        alphas=_read_overrides(raw, "lora_alpha", "alpha_pattern", _check_alpha),
        rslora=_read_flag(raw, "use_rslora"),
        base=base or None,
        bias=str(bias),
        targets=read_targets(raw),
        answer_only=_read_flag(raw, ANSWER_ONLY),
        parameters=read_parameters(raw.get("target_parameters")),
        gate=Readout.from_json(raw["gate"]) if raw.get("gate") is not None else None,
        weight_range=read_range(raw.get(WEIGHT_RANGE)),
        notes=(*note_repeated(repeated), *_note_keys(raw)),
    )


def _note_keys(raw: Mapping[str, object]) -> list[str]:
    """Notes on keys that decide the numbers and are missing, on what is read otherwise than it was trained, and on keys
    that are not known.
    """
    notes = [
        f"{CONFIG} has no {key}: PEFT's default, {DEFAULT}, is used" for key in ("r", "lora_alpha") if key not in raw
    ]
    if raw.get("init_lora_weights") == "lora_ga":
        notes.append(
            "init_lora_weights is 'lora_ga', which changes the base's weights in training: PEFT and vLLM read it as "
            f"plain LoRA, and so is it read here; to have what was trained, {CONVERT_INIT}"
        )
    unknown = [key for key, value in raw.items() if value and key not in KNOWN_KEYS]
    if unknown:
        names = ", ".join(map(quote, unknown[:MAX_NOTES])) + ", …" * (len(unknown) > MAX_NOTES)
        notes.append(f"{CONFIG} has keys that are not known and not used: {names}")
    return notes


def _read_flag(raw: Mapping[str, object], key: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool | None):
        raise AdapterError("bad_config", f"{key} is {quote(value)}: expected true or false")
    return bool(value)


def _check_init(init: object) -> None:
    """AdapterError unless an adapter of this initialization is a plain LoRA."""
    if not isinstance(init, str) or init.lower() in ("", *HARMLESS_INITS):
        return
    if init.lower().startswith(CHANGING_INITS):
        raise AdapterError(
            "init",
            f"the adapter has init_lora_weights={quote(init)}, which changes the base's weights: "
            f"{MERGE_ALL if init.lower().startswith('loftq') else CONVERT_INIT}",
        )
    raise AdapterError(
        "init",
        f"the adapter has init_lora_weights={quote(init)}, which this version does not know: if it leaves the base's "
        f"weights as they are, set it to true; known are {', '.join(map(repr, HARMLESS_INITS))}",
    )


def _read_overrides(
    raw: Mapping[str, object], key: str, pattern_key: str, check: Callable[[object, str], Number]
) -> Overrides[Number]:
    """The number under `key`, and those under `pattern_key`, whose keys are regular expressions (see `matcher`)."""
    default, patterns = check(raw.get(key, DEFAULT), key), raw.get(pattern_key)
    if patterns is None:
        patterns = {}
    if not isinstance(patterns, dict):
        raise AdapterError(
            "bad_config", f"{pattern_key} is {quote(patterns)}: expected an object of module name to number"
        )
    if len(patterns) > MAX_KEYS or sum(map(len, patterns)) > MAX_KEY_CHARS:
        raise AdapterError(
            "bad_config",
            f"{pattern_key} is too large: expected at most {MAX_KEYS} keys of together {MAX_KEY_CHARS} characters",
        )
    numbers = tuple(check(value, pattern_key) for value in patterns.values())
    return Overrides(default, PatternTable(tuple(patterns), pattern_key), numbers)


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


def write_config(adapter: LoraAdapter, details: PeftDetails | None = None, parameters: Collection[str] = ()) -> bytes:
    """The adapter_config.json that PEFT and vLLM read, keys sorted. Patterns name modules in full, so that each
    matches one; those among `parameters` are no modules of the base. ValueError when a module is not among the
    `target_modules` of `details`.
    """
    details = details or {}
    targets = details.get("target_modules")
    for name in adapter.modules:
        if targets is not None and not any(f".{name}".endswith(f".{target}") for target in targets):
            raise ValueError(f"target_modules is {targets!r}: expected one that ends the module name {name!r}")
    rslora, alphas = _choose_alphas(adapter.modules, details.get("use_rslora"))
    rank = adapter.rank
    # Readers that know no patterns scale by lora_alpha / r: right where the largest rank's scaling is that of all.
    alpha = Counter(alphas[n] for n, m in adapter.modules.items() if m.rank == rank).most_common(1)[0][0]
    config = {
        "alpha_pattern": {_anchor(n): _as_integer(a) for n, a in alphas.items() if a != alpha},
        "base_model_name_or_path": adapter.base,
        "bias": "none",
        "fan_in_fan_out": False,
        **({} if adapter.gate is None else {"gate": asdict(adapter.gate)}),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _as_integer(alpha),
        "lora_dropout": details.get("lora_dropout", 0.0),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {_anchor(n): m.rank for n, m in adapter.modules.items() if m.rank != rank},
        "target_modules": sorted(targets or (name for name in adapter.modules if name not in parameters)),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        **({ANSWER_ONLY: True} if adapter.answer_only else {}),
        **({} if adapter.weight_range is None else {WEIGHT_RANGE: [_as_integer(n) for n in adapter.weight_range]}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": rslora,
    }
    return to_json(config)


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
