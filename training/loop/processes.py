"""The processes of a run: one, or those that torchrun started; FSDP2 over them."""

from __future__ import annotations

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
from training.loop.model import layers

BACKENDS = "cpu:gloo,cuda:nccl"
PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others; a dead one is noticed sooner, by its closed connection or by torchrun."""


@dataclass(frozen=True, slots=True)
class Group:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device
    background: Any = None
    """A process group for what happens beside the training, None for one process."""

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, float64."""
        if self.world == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers)
        return [float(number) for number in numbers.tolist()]

    def gather(self, value: object) -> list[Any]:
        """Everyone's value."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def processes() -> Iterator[Group]:
    """Join the processes that torchrun started, if it did."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world == 1:
        try:
            yield Group(rank, world, device)
        finally:
            if dist.is_initialized():  # by `distribute`
                dist.destroy_process_group()
        return
    backend = BACKENDS if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Group(rank, world, device, dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        dist.destroy_process_group()


def distribute(model: nn.Module, config: Config, group: Group) -> None:
    """Move the model to the device; with several processes shard every layer, and the rest, over them (FSDP2)."""
    offload = config.policy.cpu_offload and group.device.type != "cpu"
    if group.world == 1 and not offload:
        model.to(group.device)
        return
    if group.world == 1:  # offloading is FSDP's, which wants a group of processes
        store = dist.HashStore()  # type: ignore[attr-defined]  # documented, but not in its list
        dist.init_process_group(BACKENDS, store=store, rank=0, world_size=1)
    mesh = init_device_mesh(group.device.type, (group.world,))
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for part in (*layers(model), model):
        fully_shard(part, mesh=mesh, offload_policy=policy)
    if not offload:
        model.to(group.device)


def sync_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass reduces gradients over the processes."""
    set_sync = getattr(model, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(wanted)
