"""What the server has vLLM run as the engine core's process, in place of vLLM's own function."""

import os
from typing import Any

from vllm.v1.engine.core import EngineCoreProc

from service.engine.death import record_errors
from service.engine.events import name_events
from service.engine.names import SERVER_PID
from service.process import end_with_parent


def run_engine_core(*args: Any, **options: Any) -> None:
    """vLLM's `EngineCoreProc.run_engine_core`, in a process that dies with the server and says why it died itself."""
    end_with_parent(int(os.environ[SERVER_PID]))
    record_errors()
    name_events()
    EngineCoreProc.run_engine_core(*args, **options)
