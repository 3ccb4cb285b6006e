"""Checkpoints of adapter and optimizer: sharded (torch.distributed.checkpoint), written in the background, whole or
absent.

A step's folder is written under another name and renamed when every process has written its part, so a run that is
killed at any moment leaves its last whole checkpoint. The base is never in it. Read only checkpoints you trust: their
index is a pickle, written by torch.distributed.checkpoint.
"""

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save

from adapters.files import land_folder
from training.loop.processes import Group

# One process saves alone on purpose; torch warns of it at every checkpoint.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

PROGRESS = "progress.json"
_NAME = re.compile(r"step-(\d{8})")
_PARTIAL = ".partial"

Tensors = dict[str, Tensor]


def collect_state(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensors:
    """Tensors of adapter and optimizer, sharing their memory; names do not depend on the number of processes."""
    state = {f"adapter.{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        state |= {f"optimizer.{name}.{key}": tensor for key, tensor in optimizer.state[value].items()}
    return state


class Checkpoints:
    """The checkpoints of one run in `folder`; the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int, group: Group) -> None:
        self.folder, self.keep, self.group = folder, keep, group
        self._pending: tuple[int, Any, Mapping[str, object]] | None = None
        if group.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for partial in folder.glob(f"*{_PARTIAL}"):  # a process was killed while it wrote
                shutil.rmtree(partial)
        group.barrier()

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return sorted(int(match[1]) for path in self.folder.glob("step-*") if (match := _NAME.fullmatch(path.name)))

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: Tensors, progress: Mapping[str, object]) -> None:
        """Copy the state and start to write it; the previous save must be finished."""
        assert self._pending is None
        copied = {name: value.detach().clone() for name, value in state.items()}
        writer = FileSystemWriter(str(self._partial(step)), single_file_per_rank=True, sync_files=True)
        single = self.group.world_size == 1
        future = async_save(copied, storage_writer=writer, process_group=self.group.background, no_dist=single)
        self._pending = step, future, progress

    def finish(self) -> None:
        """Wait until all processes have written the pending checkpoint, rename it, and delete the oldest. Called by all
        processes together. OSError when it could not be written; earlier checkpoints stay.
        """
        if self._pending is None:
            return
        step, future, progress = self._pending
        self._pending = None
        errors = [error for error in self.group.gather(_wait(future)) if error]
        if self.group.is_main and not errors:
            try:
                self._publish(step, progress)
            except OSError as error:
                errors = [str(error)]
        errors = self.group.gather(errors)[0]
        if errors:
            if self.group.is_main:
                shutil.rmtree(self._partial(step), ignore_errors=True)
            self.group.barrier()
            raise OSError(f"the checkpoint of step {step} could not be written: {errors[0]}")

    def load(self, step: int, state: Tensors) -> dict[str, Any]:
        """Read a checkpoint into `state`, in place; returns its progress."""
        path = self.path(step)
        dcp_load(state, storage_reader=FileSystemReader(str(path)), no_dist=self.group.world_size == 1)
        progress: dict[str, Any] = json.loads((path / PROGRESS).read_text())
        return progress

    def _partial(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}{_PARTIAL}"

    def _publish(self, step: int, progress: Mapping[str, object]) -> None:
        (self._partial(step) / PROGRESS).write_text(json.dumps(progress))
        land_folder(self._partial(step), self.path(step), replace=True)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))


def _wait(future: Future[Any]) -> str | None:
    """Wait for the writer; what went wrong, None when nothing did."""
    try:
        future.result()
    except BaseException as error:  # torch wraps what the writer raised
        causes = getattr(error, "failures", None)
        cause = next(iter(causes.values()))[0] if causes else error
        return f"{type(cause).__name__}: {cause}"
    return None


def read_tensors(folder: Path, prefix: str = "") -> Tensors:
    """Whole tensors of any sharded checkpoint whose names begin with `prefix`, which is removed."""
    reader = FileSystemReader(str(folder))
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    dcp_load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}
