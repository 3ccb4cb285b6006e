"""Logs as JSON, one object a line: of this service, BentoML and vLLM, in all their processes.

A request's line has who asked for what and what came out; never a prompt, an answer or a secret.
"""

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service.logs import MAX_MESSAGE, MAX_TRACEBACK, escape

FIELDS = "fusion_fields"
"""Attribute of a log record: further keys of its object."""
CONFIGURATION = "logging.json"
"""In the server's temporary folder: what vLLM's processes read."""


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: `time` (UTC), `level`, `logger`, `message`, and what it has besides."""

    def __init__(self, *_: Any, **__: Any) -> None:  # whatever a configuration gives
        super().__init__()

    def format(self, record: logging.LogRecord) -> str:
        """One line; its text is bounded and has no API key of this service."""
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": escape(record.getMessage(), MAX_MESSAGE),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            content["traceback"] = escape(self.formatException(record.exc_info), MAX_TRACEBACK)
        return json.dumps(content)


def use_json() -> None:
    """Have every handler of this process that writes to its output write JSON."""
    names = [logging.getLogger(name) for name in list(logging.Logger.manager.loggerDict)]
    for logger in (logging.getLogger(), *names):
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setFormatter(JsonFormatter())


def configure_vllm(folder: Path) -> None:
    """Have vLLM's processes log JSON, unless the user has configured their logs; `folder` outlives them."""
    formatter = {"()": f"{__name__}.{JsonFormatter.__name__}"}
    handler = {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stdout"}
    level = os.environ.get("VLLM_LOGGING_LEVEL", "INFO")
    configuration = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": formatter},
        "handlers": {"json": handler},
        "loggers": {"vllm": {"handlers": ["json"], "level": level, "propagate": False}},
    }
    (folder / CONFIGURATION).write_text(json.dumps(configuration))
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(folder / CONFIGURATION))
