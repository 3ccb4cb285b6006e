"""Checkpoints of adapter and optimizer: sharded (torch.distributed.checkpoint), in the background, whole or absent.

A step's folder is written under another name and renamed when every process has written its part, so a run that is
killed at any moment leaves the last whole one. The base is never in it. Read only checkpoints you trust: their index
is a pickle, as torch.distributed.checkpoint writes it.
"""

from __future__ import annotations

import json
import os
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

from training.loop.processes import Group

# One process saves alone on purpose; torch warns of it at every checkpoint.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

PROGRESS = "progress.json"
_NAME = re.compile(r"step-(\d{8})")
_PARTIAL = ".partial"

Tensors = dict[str, Tensor]


def tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensors:
    """Adapter and optimizer states by names that no number of processes changes; they share memory with both."""
    found = {f"adapter.{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        found |= {f"optimizer.{name}.{key}": state for key, state in optimizer.state[value].items()}
    return found


class Checkpoints:
    """The checkpoints of one run in `folder`, of which the last `keep` stay."""

    def __init__(self, folder: Path, keep: int, group: Group) -> None:
        self.folder, self.keep, self.group = folder, keep, group
        self._pending: tuple[int, Any, Mapping[str, object]] | None = None
        if group.first:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*{_PARTIAL}"):  # a process was killed while it wrote
                shutil.rmtree(left)
        group.wait()

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, rising."""
        return sorted(int(found[1]) for path in self.folder.glob("step-*") if (found := _NAME.fullmatch(path.name)))

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, content: Tensors, progress: Mapping[str, object]) -> None:
        """Copy the state and start to write it; the one before must be settled."""
        assert self._pending is None
        copied = {name: value.detach().clone() for name, value in content.items()}
        target = self.folder / f"step-{step:08d}{_PARTIAL}"
        writer = FileSystemWriter(str(target), single_file_per_rank=True, sync_files=True)
        alone = self.group.world == 1
        future = async_save(copied, storage_writer=writer, process_group=self.group.background, no_dist=alone)
        self._pending = step, future, progress

    def settle(self) -> None:
        """Wait until all processes have written the checkpoint that was begun, give it its name, and drop the
        oldest. Called by all processes together. OSError when it could not be written; those before stay.
        """
        if self._pending is None:
            return
        step, future, progress = self._pending
        self._pending = None
        partial = self.folder / f"step-{step:08d}{_PARTIAL}"
        problem = _problem(future)
        problems = [one for one in self.group.gather(problem) if one]
        if self.group.first and not problems:
            try:
                _publish(partial, self.path(step), progress)
                for old in self.steps()[: -self.keep]:
                    shutil.rmtree(self.path(old))
            except OSError as error:
                problems = [str(error)]
        problems = self.group.gather(problems)[0]
        if problems:
            if self.group.first:
                shutil.rmtree(partial, ignore_errors=True)
            self.group.wait()
            raise OSError(f"the checkpoint of step {step} could not be written: {problems[0]}")

    def load(self, step: int, content: Tensors) -> dict[str, Any]:
        """Read a checkpoint into `content`, in place; returns its progress."""
        path = self.path(step)
        dcp_load(content, storage_reader=FileSystemReader(str(path)), no_dist=self.group.world == 1)
        found: dict[str, Any] = json.loads((path / PROGRESS).read_text())
        return found


def _problem(future: Future[Any]) -> str | None:
    try:
        future.result()
    except BaseException as error:  # torch wraps what the writer raised
        causes = getattr(error, "failures", None)
        cause = next(iter(causes.values()))[0] if causes else error
        return f"{type(cause).__name__}: {cause}"
    return None


def _publish(partial: Path, target: Path, progress: Mapping[str, object]) -> None:
    with (partial / PROGRESS).open("w") as stream:
        json.dump(progress, stream)
        stream.flush()
        os.fsync(stream.fileno())
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_tensors(folder: Path, prefix: str = "") -> Tensors:
    """Whole tensors of any sharded checkpoint whose names begin with `prefix`, which is taken off."""
    reader = FileSystemReader(str(folder))
    metadata = reader.read_metadata()
    wanted = {}
    for name, one in metadata.state_dict_metadata.items():
        if name.startswith(prefix) and isinstance(one, TensorStorageMetadata):
            wanted[name] = torch.empty(one.size, dtype=one.properties.dtype)
    dcp_load(wanted, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in wanted.items()}
