"""Names and keys that this server does not have, as other clients and servers spell those it has: `openai/balanced`,
`HuggingFaceTB/SmolLM2-135M-Instruct`, `balanced:latest`; `adapter_id`, `lora_path`.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from adapters import did_you_mean
from service.errors import ApiError

FOREIGN_KEYS = frozenset(
    {
        *("adapter", "adapters", "adapter_id", "adapter_ids", "adapter_source", "merged_adapters"),  # LoRAX, TGI
        *("lora_path", "lora", "loras", "lora_name", "lora_id", "lora_request", "lora_adapter", "lora_adapters"),
        *("fusions", "recipe"),
    }
)
"""Keys of a request by which other servers choose adapters; vLLM leaves them out, and the base would answer."""

_RECIPE_SIGNS = re.compile(r"[*+(){}=,`\"]")
_TAG = re.compile(r"[:@#][^/:@#]*$")


def check_keys(body: Mapping[str, Any]) -> None:
    """Raise 400 for what chooses an adapter elsewhere and nothing here."""
    nested = body.get("extra_body")
    if isinstance(nested, dict) and "fusion" in nested:
        message = "'extra_body' is an argument of OpenAI's Python client, which sends what it holds: send 'fusion' in"
        raise ApiError(400, f"{message} the request itself.", param="extra_body")
    for key in sorted(FOREIGN_KEYS & body.keys()):
        if body[key]:
            message = f"{key!r} is not read here, where 'model' names an adapter, a profile or a recipe such as"
            raise ApiError(400, f"{message} '0.6*a + 0.4*b'; or send it as 'fusion'.", param=key)


def is_name(text: str) -> bool:
    """Whether `text`, which is not a valid recipe, is meant as a name: it has no operator or bracket of a recipe, does
    not start with a sign or a quote, and has blanks only if it starts with a letter.
    """
    text = text.strip()
    if not text or _RECIPE_SIGNS.search(text) or text[0] in "-'":
        return False
    return text[0].isalpha() or not re.search(r"\s", text)


def suggest(text: str, known: Collection[str]) -> str:
    """The clause "did you mean 'balanced'?" with the known name that is another form of `text`, or else is most like
    it; empty when there is none.
    """
    folded = {name.casefold(): name for name in known}
    for name in known:
        for form in _strip(name):
            folded.setdefault(form.casefold(), name)
    forms = list(_strip(text))
    near = next((folded[form.casefold()] for form in forms if form.casefold() in folded), None)
    if near is not None:
        return f"did you mean {near!r}?"
    return next(filter(None, (did_you_mean(form, known) for form in forms)), "")


def _strip(text: str) -> Iterator[str]:
    """`text`, then without its tag, its owner's name, and both."""
    text = text.strip()
    plain = _TAG.sub("", text)
    for form in dict.fromkeys((text, plain, text.rpartition("/")[2], plain.rpartition("/")[2])):
        if form:
            yield form
