"""Processes that compute: they return what calls return, end when they have to, and are replaced."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from adapters import AdapterError, LossError, RecipeError, UnknownAdapterError, load
from adapters.files import is_whole
from service.errors import ApiError
from service.fuser import SourceError
from service.processes import NICE, Processes, ProcessPool
from tests.adapters import samples
from tests.service.conftest import World

ROOT = Path(__file__).parents[2]
ERRORS = [
    AdapterError("overflow", "the update is too large"),
    RecipeError("a weight is missing", 3),
    UnknownAdapterError("tsk", ["task", "safety"]),
    LossError("the error is 0.5"),
    SourceError("0f" * 32),
    OSError(errno.ENOSPC, "No space left on device"),
]


def fail(error: Exception) -> None:
    raise error


def tell() -> tuple[int, int, int]:
    return os.getpid(), os.getpriority(os.PRIO_PROCESS, 0), torch.get_num_threads()


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    pool = ProcessPool(1)
    yield pool
    pool.close()


def wait_gone(pid: int) -> None:
    """Return once process `pid` is gone; fail after ten seconds."""
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.05)


def test_a_call_runs_behind_others_in_a_process_that_stays(pool: ProcessPool) -> None:
    pid, nice, threads = pool.run(tell)
    assert pid != os.getpid()
    assert nice == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
    assert threads == max(1, len(os.sched_getaffinity(0)) // 4)
    assert pool.run(tell)[0] == pid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_a_whole_group_stop_no_call(pool: ProcessPool, number: signal.Signals) -> None:
    pid = pool.run(os.getpid)
    threading.Timer(0.3, os.kill, (pid, number)).start()
    pool.run(time.sleep, 0.6)
    assert pool.run(os.getpid) == pid


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_come_back_as_they_were(pool: ProcessPool, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        pool.run(fail, error)
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)
    assert caught.value.__cause__ is None
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)


def test_a_process_that_is_killed_costs_its_call_alone(pool: ProcessPool) -> None:
    pid = pool.run(os.getpid)
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(ApiError, match="has ended, which happens when memory is short; try again") as caught:
        pool.run(time.sleep, 60)
    assert caught.value.status == 503
    assert pool.run(os.getpid) not in (pid, os.getpid())


def test_a_process_that_is_killed_without_work_costs_no_call(pool: ProcessPool) -> None:
    pid = pool.run(os.getpid)
    os.kill(pid, signal.SIGKILL)
    wait_gone(pid)
    time.sleep(0.5)  # until the pool knows
    assert pool.run(os.getpid) not in (pid, os.getpid())


def test_closing_ends_what_runs(tmp_path: Path) -> None:
    pool = ProcessPool(1)
    pid = pool.run(os.getpid)
    threading.Timer(0.5, pool.close).start()
    with pytest.raises(ApiError, match="The server is stopping") as caught:
        pool.run(time.sleep, 60)
    assert caught.value.status == 503
    wait_gone(pid)
    with pytest.raises(ApiError, match="The server is stopping"):
        pool.run(os.getpid)


def test_a_process_that_is_idle_ends_and_the_next_call_starts_one() -> None:
    pool = ProcessPool(1, idle_s=0.5)
    pid = pool.run(os.getpid)
    wait_gone(pid)
    assert pool.run(os.getpid) != pid
    pool.close()


def test_processes_end_with_a_server_that_is_killed() -> None:
    code = "import os, time; from service.processes import Processes; p = Processes.start(); "
    code += "print(p.fusions.run(os.getpid), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert psutil.Process(pid).is_running()
        server.kill()
    wait_gone(pid)


def test_fusions_exports_and_plans_are_those_of_one_process(world: Callable[..., World], tmp_path: Path) -> None:
    w, processes = world(), Processes.start()
    here = w.materializer
    apart = replace(here, compute=processes.fusions.run, compute_export=processes.exports.run)
    fusion = w.fusion("svd(1*a + 0.5*b, rank=2)")
    made = {}
    for name, materializer in (("here", here), ("apart", apart)):
        build, stack, exported = (tmp_path / f"{name}-{kind}" for kind in ("build", "stack", "export"))
        for folder in (build, stack, exported):
            folder.mkdir()
        materializer.write_build(fusion, build)
        materializer.write_stack([w.adapters[n].digest for n in "ab"], stack)
        files = [load(folder / "adapter") for folder in (build, stack)] + [load(materializer.export(fusion, exported))]
        made[name] = [samples.dense(adapter) for adapter in files]
        assert is_whole(build)
        assert is_whole(stack)
    for one, other in zip(made["here"], made["apart"], strict=True):
        assert samples.gap(one, other) < 1e-6 * samples.size(one)
    place = w.pool.place(fusion)
    assert apart.plan(fusion, place) == here.plan(fusion, place)
    processes.close()
