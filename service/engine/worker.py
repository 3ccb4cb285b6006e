"""What vLLM loads into every worker process (`worker_extension_cls`): importing it installs the seam.

Unlike an entry point this needs no installed distribution and no `VLLM_PLUGINS`, and it runs before the
model and its LoRA layers are made.
"""

import os
from typing import Any

from service.engine import seam
from service.engine.names import SERVER_PID
from service.engine.supported import require
from service.process import exit_when_gone, return_freed_memory

seam.install()
return_freed_memory()
if server := os.environ.get(SERVER_PID):
    exit_when_gone(int(server))


class FusionWorker:
    """Mixed into vLLM's worker class; its methods answer `collective_rpc`."""

    model_runner: Any

    def fusion_adapter_layers(self, lora_id: int) -> dict[str, int]:
        """This worker's layers that adapter `lora_id` fills, with their rank."""
        require(self.model_runner.lora_manager, "_adapter_manager")
        manager = self.model_runner.lora_manager._adapter_manager
        require(manager, "get_adapter", "modules")
        lora = manager.get_adapter(lora_id)
        layers = {} if lora is None else {n: manager.modules.get(n) for n in lora.loras}
        return {name: lora.loras[name].rank for name, layer in layers.items() if layer is not None}
