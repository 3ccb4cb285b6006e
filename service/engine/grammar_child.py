"""The child process that compiles what answers must match; `grammars` starts it and talks to it."""

import json
import resource
from typing import Any

from llguidance import LLMatcher

from service.engine.limited_child import run

STACK_BYTES = 2**20
"""Half of what a thread of the engine has, which compiles the same again."""
MAX_REASON = 500
"""Characters of an error that are answered."""
SAMPLES = [
    {"grammar": LLMatcher.grammar_from_json_schema(json.dumps({"type": "object", "required": ["a"]}))},
    {"grammar": LLMatcher.grammar_from_regex("[a-z]+")},
    {"grammar": LLMatcher.grammar_from_lark("start: x")},
]


def answer(request: dict[str, Any], _: int) -> dict[str, Any]:
    """Nothing when the grammar can be compiled, else an `error` that says why not."""
    try:
        reason = LLMatcher.validate_grammar(request["grammar"])
    except Exception as error:  # whatever it raises is said to the client that brought the grammar
        reason = str(error) or type(error).__name__
    return {"error": reason[:MAX_REASON]} if reason else {}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    run(answer, SAMPLES)
