"""The base's layers, read from its configuration alone, and whether an adapter is of that base."""

import os
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from adapters import AdapterError, FusionError, LoraAdapter, fusion_digest, match_adapter, split_gate_up
from service.engine.base_folder import BaseModelError, describe_error
from service.errors import ApiError
from service.layers import BaseLayers, find_layers
from service.records import AdapterRecord
from service.settings import BaseMatch, Settings

MAX_READ = 16
"""Registered adapters whose shapes are compared with the base's at the start."""


def read_layers(model: str, *, trust_code: bool = False) -> BaseLayers:
    """The layers of the base in the folder, or of the hub name, `model`, by its own module names.

    Of a base that sees, or hears, these are the layers of its language model: adapters act there alone. `trust_code`
    runs the code that a base brings, as vLLM's `--trust-remote-code` does. `BaseModelError` when transformers knows no
    such model.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_code)
        empty = _make_empty(config, trust_code)
    except Exception as error:  # transformers raises many types: of a rope or activation it does not know, KeyError
        reason = " ".join(describe_error(error).split())[:300]
        raise BaseModelError(f"transformers cannot read the base {model!r}: {reason}") from error
    return find_layers(empty, _language_prefix(config, empty))


def _make_empty(config: Any, trust_code: bool) -> Any:
    """The model without weights."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or trust_code:
        auto = AutoModelForCausalLM
    elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        auto = AutoModelForImageTextToText
    else:
        raise ValueError(f"{config.model_type!r} is not a causal language model")
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=trust_code)


def _language_prefix(config: Any, empty: Any) -> str:
    """What the names of the language model's modules begin with."""
    if config.get_text_config(decoder=True) is config:
        return ""
    decoder = empty.get_decoder()
    return next((f"{name}." for name, module in empty.named_modules() if module is decoder and name), "")


def read_fitting(
    read: Callable[[], LoraAdapter],
    layers: BaseLayers,
    settings: Settings,
    base_match: BaseMatch | None = None,
    answer_only: bool | None = None,
) -> tuple[LoraAdapter, str | None]:
    """What `read` returns, with the base's module names and its digest computed; and how it names its base, when that
    is none of the base's names (see `find_mismatch`). `base_match` goes before the setting, `answer_only` before what
    the adapter says. AdapterError when it does not fit the base.
    """
    adapter = read()
    if answer_only is not None:
        adapter = replace(adapter, answer_only=answer_only)
    if layers.experts:
        adapter = split_gate_up(adapter)
    adapter = match_adapter(adapter, layers.shapes)
    mismatch = find_mismatch(adapter.base, settings)
    check_fits(adapter, layers, settings, mismatch)
    if mismatch is not None:
        if (base_match or settings.base_match) == "name":
            raise AdapterError(
                "base",
                f"{_describe_bases(mismatch, settings)}; if they are the same model, say so with base_match='shapes', "
                "or add that name to FUSION_BASE_ALIASES",
            )
        adapter = replace(adapter, base=settings.base_name)
    _ = adapter.digest  # computed in this thread, and kept
    return adapter, mismatch


def find_mismatch(declared: str | None, settings: Settings) -> str | None:
    """The base that an adapter declares, unless it is one of the served base's names or its folder; of a path only the
    last part.
    """
    if declared is None or declared in {settings.base_name, settings.base, *settings.base_aliases}:
        return None
    # The text alone is compared: it may name any place of this machine, where nothing is looked at.
    if os.path.abspath(declared) in {os.path.abspath(settings.base), os.path.realpath(settings.base)}:
        return None
    is_path = os.path.isabs(declared) or declared.startswith((".", "~")) or "\\" in declared
    return f"…/{declared.replace(chr(92), '/').rstrip('/').rpartition('/')[2]}" if is_path else declared


def check_registered(
    records: Collection[AdapterRecord], layers: BaseLayers, settings: Settings, read: Callable[[str], LoraAdapter]
) -> None:
    """Raise RuntimeError when the registered adapters are of another base: none has the fusion digest that it would
    have on this one, by any of its names, or of the first that `read` can read by their digests, none fits.
    """
    names = {settings.base_name, *settings.base_aliases}
    way = "another base needs a data folder and a registry of its own (FUSION_DATA, FUSION_DATABASE)"
    if records and not any(
        record.info["fusion_digest"] == fusion_digest(record.recipe, base=name, parents={record.name: record.digest})
        for record in records
        for name in names
    ):
        raise RuntimeError(
            f"the {len(records)} adapters of the registry were registered on a base of another name than "
            f"{settings.base_name!r}: {way}; if it is the same base, add the name that it had to FUSION_BASE_ALIASES"
        )
    faults, found = list[str](), 0
    for record in list(records)[:MAX_READ]:
        try:
            adapter = read(record.digest)
        except (ApiError, FusionError, OSError):  # damaged, which the check of all files says
            continue
        found += 1
        try:
            layers.check(adapter)
        except AdapterError as error:
            faults += [f"{record.key!r}: {error}"] if error.reason == "shape" else []
    if faults and len(faults) == found:
        raise RuntimeError(f"the adapters of the registry do not fit {settings.base!r}: {way}; {faults[0]}")


def check_fits(adapter: LoraAdapter, layers: BaseLayers, settings: Settings, mismatch: str | None) -> None:
    """Raise `AdapterError` unless `adapter` fits a base of these layers; `mismatch` is how it names another one."""
    try:
        layers.check(adapter)
    except AdapterError as error:
        if mismatch is None or error.reason != "shape":
            raise
        fault = str(error).removesuffix(f" [{error.reason}]")
        raise AdapterError("base", f"{_describe_bases(mismatch, settings)}, and it does not fit: {fault}") from error


def _describe_bases(declared: str, settings: Settings) -> str:
    names = " or ".join(sorted(map(repr, {settings.base_name, *settings.base_aliases})))
    return f"the adapter's base is {declared!r}, this server's is {names}"
