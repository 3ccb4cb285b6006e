"""The processes of a run, one or those that torchrun started, and FSDP2 over them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from training.config import Config
from training.loop.model import list_layers

BACKENDS = "cpu:gloo,cuda:nccl"
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others; a dead one is noticed sooner, by its closed connection or by torchrun."""


@dataclass(frozen=True, slots=True)
class Group:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device
    background: Any = None
    """A process group for checkpoints written during training; None for one process."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, float64."""
        if self.world_size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers)
        return [float(number) for number in numbers.tolist()]

    def gather(self, value: object) -> list[Any]:
        """The value of every process, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def join_processes() -> Iterator[Group]:
    """Join the other processes if torchrun started this one."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world_size == 1:
        try:
            yield Group(rank, world_size, device)
        finally:
            if dist.is_initialized():  # by `distribute`
                dist.destroy_process_group()
        return
    backend = BACKENDS if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield Group(rank, world_size, device, dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT))
    finally:
        dist.destroy_process_group()


def distribute(model: nn.Module, config: Config, group: Group) -> None:
    """Move the model to the device; with several processes, shard every layer and the rest over them (FSDP2)."""
    offload = config.policy.cpu_offload and group.device.type != "cpu"
    if group.world_size == 1 and not offload:
        model.to(group.device)
        return
    if group.world_size == 1:  # offloading is FSDP's, which needs a process group
        store = dist.HashStore()  # type: ignore[attr-defined]  # documented, but not in its list
        dist.init_process_group(BACKENDS, store=store, rank=0, world_size=1)
    mesh = init_device_mesh(group.device.type, (group.world_size,))
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for part in (*list_layers(model), model):
        fully_shard(part, mesh=mesh, offload_policy=policy)
    if not offload:
        model.to(group.device)


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Let the next backward pass reduce gradients over the processes, or only accumulate them."""
    set_sync = getattr(model, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(enabled)
