"""What the tensors of an adapter's file are, by their names: factors, copies of the base's weights, or not LoRA."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from adapters.errors import AdapterError, quote
from adapters.files.layout import MERGE_ALL, MERGE_DORA
from adapters.module_names import PEFT, unwrap

PREFIX = f"{'.'.join(PEFT)}."
CONVERT = "`lora-fusion convert`"
MAX_NAMED = 4
"""How many copies are named in notes."""

_FACTOR = re.compile(
    r"([\w.-]{1,320})\.lora_(?:(A|B)(?:\.([\w-]{1,64}))?\.weight|embedding_(A|B)(?:\.([\w-]{1,64}))?)", re.ASCII
)
_COPY = re.compile(r"([\w.-]{1,320})\.base_layer\.(weight|bias)", re.ASCII)
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
"""Last names of embeddings and output heads; PEFT saves the base's weight beside a LoRA on one."""
_TRAINING = re.compile(r"[\w.-]{1,320}\.lora_velora_embed(?:\.[\w-]{1,64})?", re.ASCII)
"""What only training needs: VeLoRA's projections of activations, for the backward pass."""
UNSUPPORTED_TENSORS = (
    ("lora_magnitude_vector", "dora", f"DoRA rescales the whole weight; for the nearest LoRA, run {MERGE_DORA}"),
    ("trainable_tokens", "trainable_tokens", f"rows of the embedding are no LoRA; {MERGE_ALL}"),
)


@dataclass(slots=True)
class Factors:
    """The tensors' names of a module's A and B, by letter; `name` is the module's in the file, which patterns mean."""

    name: str
    is_embedding: bool
    tensors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Factors by module, sorted; the weights that tensors are copies of, by tensor; notes for the user."""

    factors: Mapping[str, Factors]
    copies: Mapping[str, str]
    notes: tuple[str, ...]


def sort_tensors(names: Iterable[str], bias: str) -> TensorNames:
    """Sort names by what they are; `bias` is the configuration's. AdapterError for what is not LoRA, by reason."""
    factors: dict[str, Factors] = {}
    copies: dict[str, str] = {}
    unused: list[str] = []
    prefixed: dict[bool, str] = {}
    adapters: dict[str | None, str] = {}
    renamed = 0
    for tensor in names:
        match = _FACTOR.fullmatch(tensor)
        if match is None:
            if _TRAINING.fullmatch(tensor):
                unused.append(tensor)
            else:
                copies[tensor] = _read_copy(tensor, bias)
            continue
        name, a_or_b, own, embedding, own_too = match.groups()
        module, has_prefix = unwrap(name)
        prefixed.setdefault(has_prefix, tensor)
        adapters.setdefault(own or own_too, tensor)
        renamed += name not in (module, PREFIX + module)
        _add(factors, module, Factors(name.removeprefix(PREFIX), embedding is not None), a_or_b or embedding, tensor)
    if len(prefixed) > 1:
        raise _reject_mixture(f"begin with {PREFIX!r} and others do not", prefixed.values())
    if len(adapters) > 1:
        raise _reject_mixture("have one adapter's name and others another, or none", adapters.values())
    notes = [
        f"left out {quote(tensor)}, a copy of the base's weight; the base's own is used"
        for tensor in islice(copies, MAX_NAMED)
    ]
    if len(copies) > MAX_NAMED:
        notes.append(f"left out {len(copies) - MAX_NAMED} more copies of the base's weights")
    if unused:
        notes.append(f"left out {len(unused)} tensors that only training needs, such as {quote(unused[0])}")
    if False in prefixed:
        notes.append(f"the tensors' names do not begin with {PREFIX!r}; PEFT leaves such tensors out")
    if renamed:
        notes.append(f"{renamed} tensors have the names of training's wrappers inside, such as {_first(factors)}")
    if adapters and None not in adapters:
        notes.append(f"the tensors' names have the adapter's name {quote(next(iter(adapters)))} inside")
    return TensorNames(dict(sorted(factors.items())), copies, tuple(notes))


def tensor_name(module: str, letter: str, *, is_embedding: bool) -> str:
    """The name that PEFT gives the factor A or B of a module."""
    return f"{PREFIX}{module}.lora_{'embedding_' if is_embedding else ''}{letter}{'' if is_embedding else '.weight'}"


def _add(factors: dict[str, Factors], module: str, new: Factors, letter: str, tensor: str) -> None:
    known = factors.setdefault(module, new)
    if letter in known.tensors or known.is_embedding != new.is_embedding:
        other = known.tensors.get(letter) or next(iter(known.tensors.values()))
        raise AdapterError("not_lora", f"tensors {quote(other)} and {quote(tensor)} are of one module, {quote(module)}")
    known.tensors[letter] = tensor


def _read_copy(tensor: str, bias: str) -> str:
    """The name of the base's weight that a tensor is a copy of; AdapterError when it is something else."""
    copy = _COPY.fullmatch(tensor)
    if copy is not None:
        module, _ = unwrap(copy[1])
        if module.rpartition(".")[2] in EMBEDDINGS and (copy[2] == "weight" or bias == "none"):
            return f"{module}.{copy[2]}"
    raise _reject_tensor(tensor, bias)


def _reject_tensor(name: str, bias: str) -> AdapterError:
    for part, reason, why in UNSUPPORTED_TENSORS:
        if part in name:
            return AdapterError(reason, f"the adapter holds the tensor {quote(name)}: {why}")
    if ".lora_B." in name and name.endswith(".bias"):
        return AdapterError("lora_bias", f"the adapter holds the tensor {quote(name)}: a bias is not a low-rank update")
    if "lora_" in name.lower():
        return AdapterError(
            "not_lora", f"tensor {quote(name)} does not have a PEFT name: expected {PREFIX}….lora_A.weight"
        )
    if name.endswith(".bias") and bias != "none":
        return AdapterError(
            "bias",
            f"the adapter holds {quote(name)}, trained with bias={quote(bias)}: a bias is not a low-rank update; train "
            "with bias='none'",
        )
    if not name.endswith((".weight", ".bias")) or ".lora." in name:
        return AdapterError(
            "not_lora",
            f"tensor {quote(name)} is neither a factor of LoRA by PEFT's names nor a weight of the base: expected "
            f"{PREFIX}….lora_A.weight",
        )
    return AdapterError(
        "modules_to_save",
        f"the adapter holds {quote(name)}, a full copy of a base weight, which is not LoRA; if it is as the base has "
        f"it, {CONVERT} --base DIR leaves it out, else {MERGE_ALL}",
    )


def _reject_mixture(fault: str, examples: Iterable[str]) -> AdapterError:
    both = " and ".join(map(quote, list(examples)[:2]))
    return AdapterError(
        "not_lora", f"some tensors {fault}: {both}; expected the names of one adapter, as PEFT saves it"
    )


def _first(factors: Mapping[str, Factors]) -> str:
    return quote(next(f.name for module, f in factors.items() if f.name != module))
