"""Log lines that nobody can forge: what a message repeats of a request cannot begin a line or command a terminal."""

import logging
from typing import Any

from service.callers import hide_secrets

MAX_MESSAGE, MAX_TRACEBACK = 8192, 32768
"""Characters of a log message, and of a traceback, that are written."""
CONTINUED = "    "
"""Before every line of a traceback but its first; a real log line begins with a time."""


def escape_records() -> None:
    """Have every log record of this process made with its message on one line, control characters escaped."""
    make = logging.getLogRecordFactory()

    def make_escaped(*args: Any, **kwargs: Any) -> logging.LogRecord:
        return escape_record(make(*args, **kwargs))

    if not getattr(make, "escapes", False):
        make_escaped.escapes = True  # type: ignore[attr-defined]  # a mark, so that records are escaped once
        logging.setLogRecordFactory(make_escaped)


def escape_record(record: logging.LogRecord) -> logging.LogRecord:
    """`record` with its message formatted and escaped, and its traceback indented."""
    try:
        message = record.getMessage()
    except Exception:
        return record  # a wrong format: the handler reports it, with escaped values
    record.msg, record.args = escape(message, MAX_MESSAGE), None
    if record.exc_info and record.exc_info[0] is not None and not record.exc_text:
        record.exc_text = escape_lines(logging.Formatter().formatException(record.exc_info))
    return record


def escape(text: str, limit: int) -> str:
    """`text` on one line: what is not printable is escaped as in Python, the middle left out beyond `limit`, and the
    secret of an API key.
    """
    text = hide_secrets(text)
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escape_lines(text: str) -> str:
    """A traceback whose lines are escaped one by one, all but the first indented: an error's text may hold newlines."""
    if len(text) > MAX_TRACEBACK:
        text = f"{text[: MAX_TRACEBACK // 2]}\n…\n{text[-MAX_TRACEBACK // 2 :]}"
    return f"\n{CONTINUED}".join(escape(line, MAX_MESSAGE) for line in text.split("\n"))
