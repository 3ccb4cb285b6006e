"""What of a profile only those see who may change it: its system prompt and its chat template, which act for all."""

from collections.abc import Mapping
from typing import Any

from service.callers import Caller
from service.errors import ApiError
from service.records import ProfileVersion
from service.tenants import may_change

HIDDEN = ("chat_template", "system")
REVEALING = (
    *("echo", "prompt_logprobs", "return_prompt_text", "return_token_ids", "return_token_offsets"),
    *("return_mm_kwargs", "enable_response_messages"),
)
"""Keys of a request by which an answer has the prompt as the engine got it."""
SCORES = "prompt_logprobs"
"""The one of them that is a number, as which vLLM reads false, too: with 0 an answer has each token of the prompt."""
REVEALING_PATHS = ("/render", "/tokenize")


def list_hidden(version: ProfileVersion, caller: Caller) -> list[str]:
    """The defaults of a profile's version that the caller does not see."""
    return [] if may_change(caller, version.tenant) else [key for key in HIDDEN if key in version.defaults]


def check_hidden(version: ProfileVersion | None, caller: Caller, path: str, body: Mapping[str, Any]) -> None:
    """Raise 403 for a request to `path` whose answer would show what the caller does not see of its profile."""
    if version is None or path.endswith("/v1/completions") or not list_hidden(version, caller):
        return
    given = {key: body[key] for key in REVEALING if body.get(key) is not None}
    key = next((key for key, value in given.items() if value is not False or key == SCORES), None)
    if key is None and not path.endswith(REVEALING_PATHS):
        return
    what = f"{key!r} shows" if key else f"{path} shows"
    message = f"{what} the prompt, of which {version.name!r} has a part that only those see who may change it."
    raise ApiError(403, f"{message} Ask without it, or by the profile's recipe.", param=key)
