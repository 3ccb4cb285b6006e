"""The door to vLLM: start its engine and OpenAI app in this process, load and unload adapters, generate.

The API layer runs here; vLLM's engine core and workers run in processes of their own.
"""

import asyncio
import itertools
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import vllm
from fastapi import FastAPI
from vllm import envs
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from service.engine import patches
from service.engine.flags import EngineOptions, parse_flags, prepare_cpu
from service.engine.names import SERVER_PID
from service.engine.probe import probe_sampling
from service.engine.supported import check_version
from service.process import return_freed_memory


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
        """The check of API keys (`--api-key`, `VLLM_API_KEY`); None when the server asks for none."""
        known = [key for key in (self.args.api_key or [envs.VLLM_API_KEY]) if key]
        return AuthenticationMiddleware(self.app, known) if known else None

    @property
    def alive(self) -> bool:
        """False once an engine process has died."""
        return not self.client.errored

    async def load(self, path: Path, name: str) -> LoRARequest:
        """Load the adapter folder at `path` into every worker, before any request names it.

        Raises RuntimeError when a worker loads none of its layers; with pipeline stages only when all do.
        """
        request = LoRARequest(name, next(self._ids), str(path))
        await self.client.add_lora(request)
        layers = await self.layers(request)
        staged = self.config.parallel_config.pipeline_parallel_size > 1
        if not (any(layers) if staged else all(layers)):
            await self.unload(request)
            raise RuntimeError("a worker loaded none of the adapter's layers; check its target_modules")
        return request

    async def unload(self, request: LoRARequest) -> None:
        """Free the adapter in every worker; the caller has drained its requests."""
        await self.client.remove_lora(request.lora_int_id)

    async def layers(self, request: LoRARequest) -> list[dict[str, int]]:
        """Per worker: the layers the adapter fills, with their rank."""
        layers: list[dict[str, int]] = await self.client.collective_rpc(
            "fusion_adapter_layers", args=(request.lora_int_id,)
        )
        return layers

    async def probe(self, prompt: Sequence[int], lora: LoRARequest | None) -> list[dict[int, float]]:
        """Log-probabilities of the likeliest tokens after `prompt`, one dict per step: prefill, then decodes."""
        sampling = probe_sampling(prompt[0], min(20, max(0, self.config.model_config.max_logprobs)))
        final = None
        async for output in self.client.generate(
            TokensPrompt(prompt_token_ids=list(prompt)),
            sampling,
            request_id=f"fusion-probe-{next(self._requests)}",
            lora_request=lora,
        ):
            final = output
        assert final is not None
        assert final.outputs[0].logprobs is not None
        return [{t: entry.logprob for t, entry in step.items()} for step in final.outputs[0].logprobs]

    async def close(self) -> None:
        """Stop the engine processes."""
        await asyncio.shield(self._exit.aclose())


async def start_engine(options: EngineOptions) -> Engine:
    """Start the engine and build vLLM's OpenAI app around it; ValueError on flags that do not fit."""
    check_version(vllm.__version__)
    os.environ[SERVER_PID] = str(os.getpid())
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    prepare_cpu(options.extra)
    return_freed_memory()
    os.environ.pop("VLLM_SERVER_DEV_MODE", None)  # development routes are never mounted
    args = parse_flags(options)
    patches.install()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(build_async_engine_client(args))
        if current_platform.is_cpu():
            # The engine's threads hold all cores: a second thread of a fusion would wait for a core at every product.
            # Under load a sum took 0.2 to 10 s with two threads, 0.1 to 0.4 s with one. The engine's own processes
            # have started.
            torch.set_num_threads(1)
        patches.count_client(client)
        tasks = await client.get_supported_tasks()
        app = build_app(args, tasks, client.model_config)
        await app_state.init_app_state(client, app.state, args, tasks)
        return Engine(client, app, args, stack.pop_all())
