"""Which name the events of the key-value cache have: the public one, which routers that read them know.

It travels to the engine in `LoRARequest.base_model_name`, which vLLM uses in its own model table alone. vLLM reads
`LoRARequest.name` for events and nowhere else; what identifies an adapter is `lora_name`.
"""

from typing import Any

from vllm.lora.request import LoRARequest

from service.engine.supported import require


def name_events() -> None:
    """Have `LoRARequest.name` be the public name, in this process; of an engine core, which makes the events."""
    require(LoRARequest, "name", "lora_name", "base_model_name")

    def name(self: Any) -> str:
        return str(self.base_model_name or self.lora_name)

    LoRARequest.name = property(name)  # type: ignore[method-assign]  # a property takes a property's place
