"""An engine core: its process, and vLLM's client of it, made and closed in a thread: the event loop goes on."""

import asyncio
import logging
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.envs import enable_envs_cache
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from service.engine.base_check import check_base, explain
from service.engine.cli import cli
from service.engine.death import DeathFile
from service.engine.supported import require

log = logging.getLogger("fusion")

CLOSE_S = 10.0
"""How long an engine may take to stop before its processes are killed."""
START_TIMEOUT_S = 3600.0
"""How long an engine may take to start: large bases are read for many minutes from a slow disk."""
PROBES = 10
"""Calls that check an engine, in the time after which it counts as dead."""


def _make_client(args: Any) -> AsyncLLM:
    """What vLLM's own server makes of its flags; returns when the engine has loaded the base."""
    engine_args = AsyncEngineArgs.from_cli_args(args)
    cli.propagate_flash_late_interaction(args, engine_args)
    try:
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except Exception as error:  # what a configuration leads to is of many types: of a rope it does not know, KeyError
        if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
            raise  # of the machine, not of the base
        raise explain(error, args.model) from error
    check_base(config)
    return AsyncLLM.from_vllm_config(
        vllm_config=config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
    )


class Core:
    """An engine that runs; its processes end with the thread that has started them (`end_with_parent`)."""

    def __init__(self, client: AsyncLLM, thread: ThreadPoolExecutor, death_file: DeathFile) -> None:
        require(client, "engine_core", "errored", "is_sleeping", "shutdown")
        require(client.engine_core, "resources")
        require(client.engine_core.resources, "engine_manager")
        self.client = client
        self._thread = thread
        self._death_file = death_file
        self._stall = ""
        self._processes = list(getattr(client.engine_core.resources.engine_manager, "processes", ()))

    @property
    def alive(self) -> bool:
        """False once an engine process has died."""
        return not self.client.errored

    def death(self) -> str:
        """Why the engine died, as far as it could say."""
        codes = {process.name: process.exitcode for process in self._processes}
        return self._stall or self._death_file.read() or f"it gave no reason; exit codes of its processes: {codes}"

    def _kill(self) -> None:
        for process in self._processes:
            with suppress(ValueError):  # closed: it has ended
                process.kill()

    async def watch(self, limit_s: float) -> None:
        """Kill the engine when it answers no call for `limit_s` seconds; returns once it is dead.

        It answers between two steps, however much it has to do.
        """
        while self.alive:
            await asyncio.sleep(limit_s / PROBES)
            try:
                await asyncio.wait_for(self.client.is_sleeping(), limit_s)
            except TimeoutError:
                self._stall = f"it answered nothing for {limit_s:g} s and was killed"
                log.error("the engine is killed: it has answered nothing for %g s", limit_s)
                self._kill()
                return
            except Exception as error:  # it died meanwhile, which `alive` says
                log.debug("the engine did not answer: %r", error)

    async def close(self) -> None:
        """Stop the engine's processes: by SIGTERM, and by SIGKILL after `CLOSE_S`."""
        loop = asyncio.get_running_loop()
        stopped = loop.run_in_executor(self._thread, self.client.shutdown, 0)
        _, late = await asyncio.wait([stopped], timeout=CLOSE_S)
        if late:
            log.error("the engine has not stopped within %g s; it is killed", CLOSE_S)
            self._kill()
        self._thread.shutdown(wait=False)
        self._death_file.delete()


async def start_core(args: Any) -> Core:
    """Start an engine; RuntimeError with its own reason when it dies before it is ready."""
    death_file = DeathFile()
    thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
    client: AsyncLLM | None = None
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            client = started = await asyncio.get_running_loop().run_in_executor(thread, _make_client, args)
            await started.reset_mm_cache()
        enable_envs_cache()  # vLLM reads one for every token of an answer
    except BaseException as error:
        if client is not None:
            thread.submit(client.shutdown, 0)
        elif isinstance(error, TimeoutError):
            for process in multiprocessing.active_children():  # vLLM waits for them for ever
                process.kill()
        thread.shutdown(wait=False)
        reason = death_file.read()
        death_file.delete()
        if isinstance(error, Exception) and (reason or isinstance(error, TimeoutError)):
            reason = reason or f"it was not ready within {START_TIMEOUT_S:g} s"
            raise RuntimeError(f"the engine could not start: {reason}") from error
        raise
    return Core(client, thread, death_file)
