"""What is replaced in vLLM's API layer, in the server's process; `seam` does the same in the workers.

Names of mixes hold weights, so vLLM's model table and its statistics must not keep them. Each replaced name is
checked first: another vLLM is rejected with an error that names what is missing.
"""

from functools import cache
from typing import Any

from vllm.entrypoints.launchers.api_server import app_state
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine import output_processor
from vllm.v1.metrics.stats import LoRARequestStates

from service.engine.models import FusionModels, apply_template, count_usage
from service.engine.supported import require


class _NoLoraStates(LoRARequestStates):
    """Keeps adapter names, which hold weights here, out of vLLM's metric labels."""

    def __init__(self, log_stats: bool = False) -> None:
        super().__init__(log_stats=False)


@cache
def install() -> None:
    """Replace vLLM's model table, adapter statistics and chat rendering; once, however often this is called."""
    require(app_state, "OpenAIServingModels", "init_app_state")
    require(output_processor, "LoRARequestStates")
    require(OnlineRenderer, "preprocess_chat")
    app_state.OpenAIServingModels = FusionModels  # type: ignore[misc]  # a class takes a class's place
    output_processor.LoRARequestStates = _NoLoraStates  # type: ignore[misc]  # as above
    OnlineRenderer.preprocess_chat = apply_template(OnlineRenderer.preprocess_chat)  # type: ignore[method-assign]  # as above


def count_client(client: Any) -> None:
    """Have the engine client's `generate` report each generation to the request it runs for."""
    require(client, "generate")
    client.generate = count_usage(client.generate)
