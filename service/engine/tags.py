"""Structural tags of requests, whose shape alone is checked when a body is read.

vLLM has xgrammar make a grammar of them there, on the event loop and without limits, to see whether they are valid.
Here they are compiled like all that answers must match: by a child with limits, before the engine sees them.
"""

import json
from typing import Any

from vllm.entrypoints.generate.base import protocol
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import check_json_nesting

from service.engine.supported import require

MAX_CHARS = 16 * 1024


def check_tag(payload: Any, *, parameter: str) -> None:
    """Replacement for vLLM's `validate_structural_tag_payload`: raise `VLLMValidationError` unless the text is a
    structural tag.
    """
    if isinstance(payload, str) and len(payload) > MAX_CHARS:
        message = f"The output constraint has {len(payload)} characters; the limit is {MAX_CHARS}."
        raise VLLMValidationError(message, parameter=parameter)
    if isinstance(payload, str):
        check_json_nesting(payload, structural_tag=True)
    try:
        tag = json.loads(payload)
        if not (isinstance(tag["format"], dict) if "format" in tag else _is_legacy(tag)):
            raise ValueError("neither form")
    except (TypeError, ValueError, KeyError) as error:
        message = f"Invalid {parameter} structural_tag specification."
        raise VLLMValidationError(message, parameter=parameter) from error


def _is_legacy(tag: Any) -> bool:
    """Whether these are `structures` that begin with `triggers`."""
    return isinstance(tag["triggers"], list) and all(
        isinstance(one["begin"], str) and isinstance(one["end"], str) and "schema" in one for one in tag["structures"]
    )


def install() -> None:
    """Have vLLM's models of requests check tags so."""
    require(protocol, "validate_structural_tag_payload")
    protocol.validate_structural_tag_payload = check_tag
