"""Why an engine process died: vLLM logs it there, and the server learns only that it is dead.

Core and workers write what vLLM logged as an error there into a file that the server has named in their environment.
"""

import logging
import os
import tempfile
import time
from pathlib import Path

DEATH_FILE = "LORA_FUSION_DEATH_FILE"
"""Environment of the engine's processes: where they say what went wrong."""
MAX_CHARACTERS = 500
BURST_S = 10.0
"""A worker that fails is followed within this by the core that it takes with it, which knows less."""
RECENT_S = 30.0
"""A death is noticed within this."""


class _Recorder(logging.Handler):
    """Writes down the root cause of an error, unless it follows from one that was written just before."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        while error is not None and error.__cause__ is not None:
            error = error.__cause__
        text = record.getMessage() if error is None else f"{type(error).__name__}: {error}"
        try:
            last = self._path.stat()
            if not last.st_size or time.time() - last.st_mtime > BURST_S:
                self._path.write_text(" ".join(text.split())[:MAX_CHARACTERS])
        except OSError:
            self.handleError(record)


def record_errors() -> None:
    """In an engine process: write down what vLLM logs as an error, where the server wants to know."""
    if path := os.environ.get(DEATH_FILE):
        logging.getLogger("vllm").addHandler(_Recorder(Path(path)))


class DeathFile:
    """The server's side: a file that engine processes started from now on write to."""

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="fusion-engine-")
        os.close(handle)
        self._path = Path(name)
        os.environ[DEATH_FILE] = name

    def read(self) -> str:
        """The error that was just written, its type and message; empty when there is none."""
        if not self._path.exists() or time.time() - self._path.stat().st_mtime > RECENT_S:
            return ""  # an older one killed nothing
        return self._path.read_text()

    def delete(self) -> None:
        """Forget it."""
        self._path.unlink(missing_ok=True)
