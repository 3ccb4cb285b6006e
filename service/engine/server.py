"""The door to vLLM: start its engine and OpenAI app in this process, load and unload adapters, generate.

The API layer runs here; vLLM's engine core and workers run in processes of their own.
"""

import asyncio
import itertools
import json
import logging
import os
import platform
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
import vllm
from fastapi import FastAPI
from vllm import envs
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.metrics.stats import LoRARequestStates

from service.engine import seam
from service.engine.models import FusionModels, Served, meter, metered, served, templated
from service.engine.names import SERVER_PID
from service.engine.proof import probing
from service.process import return_freed_memory

log = logging.getLogger(__name__)

FEW_CORES = 4
CPU_KERNELS_KEPT = 128
CPU_MEMORY_FLAGS = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
LISTENING = {
    "--host": "set FUSION_HOST",
    "--port": "set FUSION_PORT",
    "--uds": "set FUSION_HOST and FUSION_PORT",
    "--ssl-": "put a reverse proxy that speaks TLS before the service",
}
"""vLLM's flags for a server of its own, which there is none of here, and what does it instead."""

__all__ = ["Engine", "EngineOptions", "LoRARequest", "Served", "meter", "served", "start"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The flags this service decides; `extra` is passed to vLLM's own parser as it is."""

    model: str
    served_name: str
    max_lora_rank: int
    max_loras: int
    max_cpu_loras: int
    mixing: bool
    extra: tuple[str, ...] = ()


def _slow_bfloat16() -> bool:
    """Whether this is an x86 CPU without bfloat16 instructions (there it is emulated, many times slower)."""
    x86 = current_platform.is_cpu() and platform.machine() in ("x86_64", "AMD64")
    return x86 and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _prepare_cpu(extra: Sequence[str]) -> None:
    """Set what vLLM's CPU workers read from the environment, unless the user has."""
    if not current_platform.is_cpu():
        return
    if len(os.sched_getaffinity(0)) <= FEW_CORES:
        # vLLM keeps one core free for its scheduler; of a few cores that is too much, and the system shares them.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    # oneDNN compiles a kernel for every number of tokens in a step and keeps 1,024 of some 100 KB each.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(CPU_KERNELS_KEPT))
    if not any(one.replace("_", "-").startswith(CPU_MEMORY_FLAGS) for one in extra):
        # vLLM would take 92 % of the machine's memory, and not start where a little more than the rest is in use.
        quarter = psutil.virtual_memory().available // 4 // 2**30
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, quarter)))


def _arguments(options: EngineOptions) -> Any:
    for one in options.extra:
        for flag, instead in LISTENING.items():
            if one.replace("_", "-").startswith(flag):
                raise ValueError(f"{one} in FUSION_ENGINE_ARGS has no effect: BentoML listens, not vLLM; {instead}")
    argv = [
        *("--model", options.model, "--served-model-name", options.served_name),
        *("--enable-lora", "--max-lora-rank", str(options.max_lora_rank)),
        *("--max-loras", str(options.max_loras), "--max-cpu-loras", str(options.max_cpu_loras)),
        # Also when nothing is mixed: on CPUs the seam's kernels are the faster and the safer ones.
        *("--worker-extension-cls", "service.engine.worker.FusionWorker"),
        *("--additional-config", json.dumps({"fusion_seam": seam.SEAM_VERSION})),
        *(("--dtype", "float32") if _slow_bfloat16() else ()),  # the user's own --dtype comes later and wins
    ]
    try:
        args = make_arg_parser(FlexibleArgumentParser()).parse_args([*argv, *options.extra])
    except SystemExit as error:  # argparse has printed what is wrong
        given = " ".join(options.extra)
        raise ValueError(f"vLLM does not take FUSION_ENGINE_ARGS={given!r}; its message is above") from error
    validate_parsed_serve_args(args)
    return args


def mixing_conflict(args: Any) -> str | None:
    """Name of the flag that rules mixing out, or None (each one shards what the weights multiply).

    This vLLM's only sequence parallelism that shards tokens comes with expert parallelism.
    """
    conflicts = {
        "--fully-sharded-loras": args.fully_sharded_loras,
        "--enable-expert-parallel": args.enable_expert_parallel,
        "--prefill-context-parallel-size": (args.prefill_context_parallel_size or 1) > 1,
    }
    return next((flag for flag, on in conflicts.items() if on), None)


class _NoLoraStates(LoRARequestStates):
    """Keeps adapter names, which here hold weights, out of vLLM's metric labels."""

    def __init__(self, log_stats: bool = False) -> None:
        super().__init__(log_stats=False)


class Engine:
    """A running engine and its OpenAI app; adapters are known by integer ids, never reused."""

    def __init__(self, client: Any, app: FastAPI, args: Any, stack: AsyncExitStack) -> None:
        self.client = client
        self.app = app
        self.args = args
        self._exit = stack
        self._ids = itertools.count(1000)  # vLLM's warm-up uses small ids
        self._requests = itertools.count()

    @property
    def config(self) -> Any:
        """vLLM's full configuration."""
        return self.client.vllm_config

    @cached_property
    def keys(self) -> AuthenticationMiddleware | None:
        """What tells right API keys (`--api-key`, `VLLM_API_KEY`) from wrong ones; None when none is asked for."""
        known = [key for key in (self.args.api_key or [envs.VLLM_API_KEY]) if key]
        return AuthenticationMiddleware(self.app, known) if known else None

    @property
    def alive(self) -> bool:
        """False once an engine process has died."""
        return not self.client.errored

    async def load(self, path: Path, name: str) -> LoRARequest:
        """Load the adapter folder at `path` into every worker, before any request names it.

        Raises when a worker took none of its layers; with pipeline stages some may rightly hold none.
        """
        request = LoRARequest(name, next(self._ids), str(path))
        await self.client.add_lora(request)
        layers = await self.layers(request)
        staged = self.config.parallel_config.pipeline_parallel_size > 1
        if not (any(layers) if staged else all(layers)):
            await self.unload(request)
            raise RuntimeError("a worker took no layer of it")
        return request

    async def unload(self, request: LoRARequest) -> None:
        """Free the adapter in every worker; the caller has drained its requests."""
        await self.client.remove_lora(request.lora_int_id)

    async def layers(self, request: LoRARequest) -> list[dict[str, int]]:
        """Per worker: the layers the adapter fills, with their rank."""
        found: list[dict[str, int]] = await self.client.collective_rpc(
            "fusion_adapter_layers", args=(request.lora_int_id,)
        )
        return found

    async def probe(self, prompt: Sequence[int], lora: LoRARequest | None) -> list[dict[int, float]]:
        """Log-probabilities of the likeliest tokens after `prompt`, one dict a step: prefill, then decodes."""
        sampling = probing(prompt[0], min(20, max(0, self.config.model_config.max_logprobs)))
        final = None
        async for output in self.client.generate(
            TokensPrompt(prompt_token_ids=list(prompt)),
            sampling,
            request_id=f"fusion-probe-{next(self._requests)}",
            lora_request=lora,
        ):
            final = output
        assert final is not None and final.outputs[0].logprobs is not None
        return [{t: entry.logprob for t, entry in step.items()} for step in final.outputs[0].logprobs]

    async def close(self) -> None:
        """Stop the engine processes."""
        await asyncio.shield(self._exit.aclose())


async def start(options: EngineOptions) -> Engine:
    """Start the engine and build vLLM's OpenAI app around it; raises on flags mixing cannot hold with."""
    seam.check_version(vllm.__version__)
    os.environ[SERVER_PID] = str(os.getpid())
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    _prepare_cpu(options.extra)
    return_freed_memory()
    os.environ.pop("VLLM_SERVER_DEV_MODE", None)  # development routes are never mounted
    args = _arguments(options)
    if options.mixing and (flag := mixing_conflict(args)):
        raise ValueError(f"{flag} cannot be combined with mixing; set FUSION_MIXED=off or drop it")
    # Names hold weights here: the model table and the statistics must not keep them.
    app_state.OpenAIServingModels = FusionModels  # type: ignore[misc]  # a seam
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.v1.engine import output_processor

    output_processor.LoRARequestStates = _NoLoraStates  # type: ignore[misc]  # a seam
    OnlineRenderer.preprocess_chat = templated(OnlineRenderer.preprocess_chat)  # type: ignore[method-assign]  # a seam
    exit_stack = AsyncExitStack()
    client = await exit_stack.enter_async_context(build_async_engine_client(args))
    if current_platform.is_cpu():
        # The engine's threads hold all cores: a second thread of a fusion would wait for a core at every product. Under
        # load a sum took 0.2 to 10 s with two threads, 0.1 to 0.4 s with one. The engine's own processes have started.
        torch.set_num_threads(1)
    client.generate = metered(client.generate)  # type: ignore[method-assign]  # a seam
    try:
        tasks = await client.get_supported_tasks()
        app = build_app(args, tasks, client.model_config)
        await app_state.init_app_state(client, app.state, args, tasks)
    except BaseException:
        await exit_stack.aclose()
        raise
    return Engine(client, app, args, exit_stack)
