"""LoRA on the embedding and the output head: which of these layers this engine adapts, and which rows of logits belong
to which adapter.

vLLM takes the adapter of a row of logits from a list of the rows that are sampled from. Logits of a prompt have other
rows: on CPUs they are found by their place among the step's hidden states (`mark_prompts`), on GPUs, where vLLM would
take a wrong adapter's, such requests are refused (`refuse_prompts`).
"""

import re
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.platforms import current_platform

from service.engine.names import EMBEDDING, EXPERTS, HEAD, STACKED_EXPERTS
from service.engine.slices import find_language_wrapper
from service.engine.supported import require

PROMPT_LOGITS = (
    "Log-probabilities of a prompt cannot be computed with a LoRA on the output head (lm_head): this vLLM would take "
    "another adapter's on GPUs. Leave 'echo' or 'prompt_logprobs' out."
)

_NUMBER = re.compile(r"\.\d+\.")

Generate = Callable[..., AsyncGenerator[Any, None]]


def list_layers(lora_manager: Any) -> dict[str, str]:
    """The layers of a worker besides dense ones that vLLM adapts: HEAD, … by vLLM's name of the layer."""
    from vllm.lora import layers

    require(lora_manager, "_adapter_manager")
    require(lora_manager._adapter_manager, "modules")
    kinds = {
        layers.VocabParallelEmbeddingWithLoRA: EMBEDDING,
        layers.LogitsProcessorWithLoRA: HEAD,
        layers.FusedMoEWithLoRA: EXPERTS,
        layers.FusedMoE3DWithLoRA: STACKED_EXPERTS,
    }
    modules = lora_manager._adapter_manager.modules.items()
    return {name: kinds[type(module)] for name, module in modules if type(module) in kinds}


def find_missing(lora_manager: Any, lora_id: int) -> list[str]:
    """The layers of adapter `lora_id` outside of the dense ones that this worker has no place for; other pipeline
    stages may have one.
    """
    require(lora_manager, "_adapter_manager")
    manager = lora_manager._adapter_manager
    require(manager, "get_adapter", "modules")
    lora = manager.get_adapter(lora_id)
    names = [] if lora is None else [name for name in lora.loras if ".experts" in name or not _NUMBER.search(name)]
    # vLLM keeps the gate and up projections of stacked experts under another name beside the layer's own.
    return [name for name in names if name.removesuffix(".base_layer") not in manager.modules]


def has_head(layers: Iterable[str]) -> bool:
    """Whether an output head is among these layers of vLLM, which finds it by this name itself."""
    return any("lm_head" in name for name in layers)


def why_no_head(config: Any) -> str | None:
    """Why this engine gives wrong logits with a LoRA on the output head, or None; `config` is vLLM's full one."""
    if current_platform.is_cpu():
        return None
    if config.speculative_config is not None:
        return "with speculative decoding"
    if getattr(config.parallel_config, "enable_batch_sharded_sampling", False):
        return "with batch-sharded sampling"
    return None


def refuse_prompts(generate: Generate, heads: Collection[int]) -> Generate:
    """vLLM's `generate`, refusing log-probabilities of prompts for the adapters `heads`, by id; not on CPUs."""
    if current_platform.is_cpu():
        return generate

    def checked(
        prompt: Any, sampling_params: Any, *args: Any, lora_request: Any = None, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        if lora_request is not None and lora_request.lora_int_id in heads:
            wanted = ("prompt_logprobs", "prompt_logprob_token_ids")
            if any(getattr(sampling_params, name, None) is not None for name in wanted):
                raise VLLMClientError(PROMPT_LOGITS)
        return generate(prompt, sampling_params, *args, lora_request=lora_request, **kwargs)

    return checked


def mark_prompts(runner: Any) -> None:
    """Have the V1 `runner` class tell the CPU's LoRA layers when logits of prompts are computed."""
    require(runner, "_get_prompt_logprobs_dict")
    stock: Callable[..., Any] = runner._get_prompt_logprobs_dict

    def _get_prompt_logprobs_dict(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "lora_manager"):
            return stock(self, hidden_states, *args, **kwargs)
        wrapper = find_language_wrapper(self.lora_manager)
        wrapper.fusion_hidden = hidden_states
        try:
            return stock(self, hidden_states, *args, **kwargs)
        finally:
            wrapper.fusion_hidden = None

    runner._get_prompt_logprobs_dict = _get_prompt_logprobs_dict


def install() -> None:
    """Put `mark_prompts` into this worker's process; called once."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if current_platform.is_cpu():
        mark_prompts(GPUModelRunner)
