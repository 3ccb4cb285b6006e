"""What schemathesis does in our runs besides its own: models that exist, answers with an end, and counts.

Loaded by SCHEMATHESIS_HOOKS; FUZZ_COUNTS names the file that gets the counts, FUZZ_MODEL the model.
"""

import atexit
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis

LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
counts: Counter[str] = Counter()


@schemathesis.hook  # type: ignore[untyped-decorator]
def map_body(context: Any, body: Any) -> Any:
    """Have most bodies name a model that exists, and all of them end soon: else each is a 404, or takes its time."""
    if isinstance(body, dict) and body.keys() & {"model", "messages", "prompt", "input"}:
        body |= {"model": os.environ["FUZZ_MODEL"]} | dict.fromkeys(LIMITS, 1)
        for count in ("n", "best_of"):
            if isinstance(body.get(count), int):
                body[count] = min(body[count], 2)
    return body


@schemathesis.hook  # type: ignore[untyped-decorator]
def after_call(context: Any, case: Any, response: Any) -> None:
    """Count the answer."""
    counts[f"{case.operation.method.upper()} {case.operation.path} {response.status_code}"] += 1


@schemathesis.check  # type: ignore[untyped-decorator]
def errors_have_one_shape(context: Any, response: Any, case: Any) -> None:
    """An error is OpenAI's object with a message, and shows nothing of Python."""
    if response.status_code >= 400 and case.method != "HEAD":
        error = json.loads(response.content)
        message = error["error"]["message"]
        assert message, "an error without a message"
        assert "Traceback" not in message
        assert "object at 0x" not in message


@atexit.register
def write_counts() -> None:
    """At the end of schemathesis' process."""
    Path(os.environ["FUZZ_COUNTS"]).write_text(json.dumps(counts))
