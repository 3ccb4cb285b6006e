"""What vLLM loads into every worker process (`worker_extension_cls`): importing it installs the seam.

Unlike an entry point this needs no installed distribution and no `VLLM_PLUGINS`, and it runs before the
model and its LoRA layers are made.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.utils.gc_utils import freeze_gc_heap

from service.engine import seam, slices, special
from service.engine.death import record_errors
from service.engine.loads import Loads
from service.engine.names import SERVER_PID
from service.engine.supported import require
from service.logs import escape_records
from service.process import end_with_parent, exit_when_gone, return_freed_memory

escape_records()
ray = sys.modules.get("ray")
# The parent of a worker that Ray has started is Ray's own, on whatever machine; it ends with the engine's actors.
if (server := os.environ.get(SERVER_PID)) and not (ray is not None and ray.is_initialized()):
    end_with_parent(os.getppid())
    exit_when_gone(int(server))  # where the kernel does not do it
record_errors()
seam.install()
special.install()
return_freed_memory()


class FusionWorker:
    """Mixed into vLLM's worker class; its methods answer `collective_rpc`."""

    model_runner: Any
    scheduler_config: Any

    def fusion_adapter_layers(self, lora_id: int) -> dict[str, int]:
        """This worker's layers that adapter `lora_id` fills, with their rank."""
        require(self.model_runner.lora_manager, "_adapter_manager")
        manager = self.model_runner.lora_manager._adapter_manager
        require(manager, "get_adapter", "modules")
        lora = manager.get_adapter(lora_id)
        layers = {} if lora is None else {n: manager.modules.get(n) for n in lora.loras}
        return {name: lora.loras[name].rank for name, layer in layers.items() if layer is not None}

    def fusion_load(self, name: str, id_: int, path: str) -> dict[str, Any] | None:
        """Do the next slice of loading an adapter; what `loads.Report` says of it once that is done, else None."""
        if not hasattr(self, "fusion_loads"):
            self.fusion_loads = Loads(self.model_runner.lora_manager)
            freeze_gc_heap()  # once all is there: looking through a model's objects would hold a step up for 0.5 s
        report = self.fusion_loads.advance(LoRARequest(name, id_, path))
        return None if report is None else asdict(report)

    def fusion_special_layers(self) -> dict[str, str]:
        """This worker's layers besides dense ones that vLLM adapts: their kind by vLLM's name."""
        return special.list_layers(self.model_runner.lora_manager)

    def fusion_number_modules(self, names: Sequence[str]) -> list[str]:
        """Say which module each row of a table is for, as adapters spell them; gives those that this worker has."""
        return slices.number_modules(self.model_runner.lora_manager, names)

    def fusion_spare_rows(self) -> int | None:
        """How many rows of weights this worker has beyond one for each sequence; None: every step finds enough."""
        require(self, "scheduler_config")
        wrapper = slices.find_language_wrapper(self.model_runner.lora_manager)
        spare: int | None = wrapper.fusion_store.spare(self.scheduler_config.max_num_seqs, len(wrapper.fusion_index))
        return spare
