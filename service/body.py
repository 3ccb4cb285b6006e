"""What a JSON body may hold, checked before anything else reads it: no size of body may hold up the event loop.

The costs of vLLM's validation grow with the objects and lists in a body, and each is some hundred times the cost of
the checks here, which end at the first that is too many.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from adapters import Recipe
from service.errors import ApiError
from service.validation import MAX_PATH, MAX_QUOTED

MAX_CONTAINERS = 16_384
"""Objects and lists in a body."""
MAX_ITEMS = 4096
"""Objects and lists in one list: messages, items of `input`, parts of a content, tools."""
MAX_KEYS = 65_536
"""Keys of one object."""
MAX_DEPTH = 100
MAX_CHARS = {"stop": 65_536, "stop_sequences": 65_536, "bad_words": 16_384}
"""All texts of a key together: each token is compared with each `stop`, each bad word is tokenized for each prompt."""
MAX_SEQUENCES = 1024
"""Prompts (or conversations) of one request, times `n`."""
MAX_PARAMETERS = 4 * 2**20
"""Bytes of a body without its prompts, times the sequences: each gets its own copy of the parameters."""
MAX_LENGTH_PENALTY = 16.0
"""Either way. Beam search divides by the length to this power, which has to stay in a float's range."""
MIN_REPETITION_PENALTY = 1e-3
"""Logits of tokens that were there are divided by it, and have to stay in a float's range."""
TRANSFERS = frozenset({"kv_transfer_params", "ec_transfer_params"})
"""Objects that vLLM passes to its engine among `vllm_xargs`, whose values of other types it would take for them."""
PROMPTS = ("prompt", "prompt_embeds", "messages")
TOO_MANY = f"The JSON body has more than {MAX_CONTAINERS} objects and lists; send less at once."
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
"""A string, or one without an end: where a match begins it never fails, so that no part is read twice."""
HALF = re.compile("[\ud800-\udfff]")
"""What JSON's escapes can write, but no encoding and no tokenizer takes."""
LONG_NUMBER = re.compile(rb"(?<![0-9.])-?[0-9]{19,}+(?![.eE])")
"""An integer that may be outside 64 bits."""


def parse_body(raw: bytes) -> Any:
    """The JSON value of a body; `ApiError` 400 when it is none, not in UTF-8, or holds too much."""
    if not raw:
        return {}
    # Building too many objects takes longer than seeing that there are too many.
    if _count_brackets(raw) > MAX_CONTAINERS and _count_brackets(STRING.sub(b"", raw)) > MAX_CONTAINERS:
        raise ApiError(400, TOO_MANY)
    try:
        if LONG_NUMBER.search(raw):
            _check_integers(STRING.sub(b"", raw))
        body = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}.") from error
    _check_size(body)
    if b"\\ud" in raw or b"\\uD" in raw:
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _describe_half(body) from None
    return body


def _count_brackets(raw: bytes) -> int:
    return raw.count(b"{") + raw.count(b"[")


def _check_integers(raw: bytes) -> None:
    for match in LONG_NUMBER.finditer(raw):
        text = match[0]
        if len(text) > len(str(-(2**63))) or not -(2**63) <= int(text) < 2**63:
            raise ValueError(f"the integer {text[:MAX_QUOTED].decode()} is outside 64 bits")


def _check_size(body: Any) -> None:
    """Raise 400 when a value holds too many containers, or too deep; level by level, up to the first too many."""
    level, count = [body] if isinstance(body, dict | list) else [], 0
    for _depth in range(MAX_DEPTH):
        below = []
        for container in level:
            if isinstance(container, dict):
                if len(container) > MAX_KEYS:
                    raise ApiError(400, f"An object in the body has {len(container)} keys; the limit is {MAX_KEYS}.")
                below += [value for value in container.values() if isinstance(value, dict | list)]
                continue
            inner = [value for value in container if isinstance(value, dict | list)]
            if len(inner) > MAX_ITEMS:
                message = f"A list in the body has {len(inner)} objects or lists; the limit is {MAX_ITEMS}."
                raise ApiError(400, message)
            below += inner
            if count + len(below) > MAX_CONTAINERS:
                break
        count += len(below)
        if count > MAX_CONTAINERS:
            raise ApiError(400, TOO_MANY)
        if not below:
            return
        level = below
    raise ApiError(400, f"The JSON body is nested more than {MAX_DEPTH} deep.")


def _describe_half(body: Any) -> ApiError:
    """The 400 for a body with half a character, at the place of one such text or key."""
    path, text = _find_half([((), {"": body})])
    half = HALF.search(text)
    assert half is not None
    message = (
        f"{'.'.join(path[1:MAX_PATH])[:MAX_QUOTED]!r} has half a character, {half[0]!r} at position {half.start()}: "
        "a UTF-16 surrogate without its other half; send both or neither"
    )
    param = path[1][:MAX_QUOTED] if path[1:] and not HALF.search(path[1]) else None
    return ApiError(400, f"The request body is not valid JSON: {message}.", param=param)


def _find_half(containers: list[tuple[tuple[str, ...], Any]]) -> tuple[tuple[str, ...], str]:
    """Path and text of the first text or key with half a character; there is one."""
    for path, container in containers:  # grows
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in pairs:
            for text in (key, value):
                if isinstance(text, str) and not text.isascii() and HALF.search(text):
                    return (*path, str(key)), text
            if isinstance(value, dict | list):
                containers.append(((*path, str(key)), value))
    raise AssertionError("no half of a character")


def check_counts(body: Mapping[str, Any]) -> None:
    """Raise 400 for more sequences, text to compare with, parameters or length penalty than one request may ask for."""
    for key, limit in MAX_CHARS.items():
        texts = body.get(key)
        texts = texts if isinstance(texts, list) else [texts]
        if sum(len(text) for text in texts if isinstance(text, str)) > limit:
            raise ApiError(400, f"{key!r} has more than {limit} characters; send shorter ones.", param=key)
    penalty = body.get("length_penalty")
    if not abs(_read_number(penalty)) <= MAX_LENGTH_PENALTY:
        message = f"'length_penalty' must be within ±{MAX_LENGTH_PENALTY:g}, got {penalty!r:.{MAX_QUOTED}}."
        raise ApiError(400, message, param="length_penalty")
    repetition = body.get("repetition_penalty")
    if 0 < _read_number(repetition) < MIN_REPETITION_PENALTY:
        message = f"'repetition_penalty' must be at least {MIN_REPETITION_PENALTY:g}, got {repetition!r:.{MAX_QUOTED}}."
        raise ApiError(400, message, param="repetition_penalty")
    number = _read_number(body.get("n"))
    answers = max(1, int(number)) if math.isfinite(number) else 1
    prompts, param = max((_count_prompts(body.get(key)), key) for key in PROMPTS)
    if prompts * answers > MAX_SEQUENCES:
        message = f"{prompts} × {answers} answers (prompts × 'n') exceed the limit of {MAX_SEQUENCES}; ask for fewer."
        raise ApiError(400, message, param=param if prompts > answers else "n")
    if prompts * answers > 1:
        rest = len(json.dumps({key: value for key, value in body.items() if key not in PROMPTS}))
        if prompts * answers * rest > MAX_PARAMETERS:
            message = f"{prompts} prompts × {answers} answers with {rest} bytes of parameters exceed the limit of"
            raise ApiError(400, f"{message} {MAX_PARAMETERS} bytes; send fewer at once.")


def _read_number(value: object) -> float:
    """A number as pydantic reads it; 1 for what it refuses."""
    try:
        return float(value) if isinstance(value, int | float | str) else 1.0
    except (ValueError, OverflowError):
        return 1.0


def _count_prompts(value: object) -> int:
    """A list of texts or of lists is many prompts; one of numbers, or of messages, is one."""
    return len(value) if isinstance(value, list) and value and isinstance(value[0], str | list) else 1


def check_arguments(body: Mapping[str, Any], reserved: frozenset[str]) -> None:
    """Raise 400 for a key of `chat_template_kwargs` that is among the `reserved` ones, or of `vllm_xargs` that vLLM
    sets itself.
    """
    arguments = body.get("chat_template_kwargs")
    if isinstance(arguments, dict) and (wrong := sorted(arguments.keys() & reserved)):
        message = f"'chat_template_kwargs' must hold variables of the chat template, but {wrong[0]!r} is not one."
        raise ApiError(400, message, param="chat_template_kwargs")
    extras = body.get("vllm_xargs")
    if isinstance(extras, dict) and (wrong := sorted(extras.keys() & TRANSFERS)):
        message = f"'vllm_xargs' may not hold {wrong[0]!r}, which is a key of the body itself."
        raise ApiError(400, message, param="vllm_xargs")


def check_fusion_keys(body: Mapping[str, Any], recipe: Recipe, *, strict: bool) -> bool:
    """Whether the request is strict, by default `strict`; 400 for what does not go together with a fusion."""
    strict = body.get("strict", strict)
    if not isinstance(strict, bool):
        raise ApiError(400, f"'strict' must be true or false, got {json.dumps(strict)[:100]}.", param="strict")
    if body.get("use_beam_search") and not recipe.is_constant:
        # vLLM gives each step of a beam as a prompt of its own.
        message = "'use_beam_search' works with weights that are the same at all positions and prompts only."
        raise ApiError(400, message, param="use_beam_search")
    if body.get("background"):
        # vLLM would go on after the answer, when the adapters under it may be unloaded.
        raise ApiError(400, "'background' works with the base model only.", param="background")
    return strict
