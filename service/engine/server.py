"""The door to vLLM: start its engine and OpenAI app in this process, load and unload adapters, generate.

The API layer runs here; vLLM's engine core and workers run in processes of their own.
"""

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import vllm
from fastapi import FastAPI
from vllm import envs
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from service.engine import patches, routes, special
from service.engine.bodies import bound_text, bound_validation
from service.engine.core import Core, start_core
from service.engine.flags import EngineOptions, count_ranks, parse_flags, prepare_cpu
from service.engine.grammars import GrammarChecker
from service.engine.loader import Loader
from service.engine.names import SERVER_PID, SLOT_WAIT_S
from service.engine.overflow import Overflows
from service.engine.probe import probe_sampling
from service.engine.ranks import Ranks
from service.engine.spare_rows import SpareRows
from service.engine.supported import VERSIONS, check_version, public_version
from service.engine.templates import SWITCHED_OFF, TemplateError, TemplateRenderer
from service.process import return_freed_memory

log = logging.getLogger("fusion")

DROP_TIMEOUT_S = 120.0
"""How long an adapter that failed to load may take to be freed."""
MAX_N = 128
"""Answers to one prompt (`n`), unless VLLM_MAX_N_SEQUENCES says otherwise; vLLM's own limit is 16,384."""


class _Server:
    """In the place of uvicorn's server, to which vLLM's error handlers say that the engine has died.

    `Engine.alive` says so too, and another engine is started.
    """

    should_exit = False


class Engine:
    """A running engine and its OpenAI app; adapters are known by integer ids, never reused."""

    def __init__(
        self,
        core: Core,
        app: FastAPI,
        args: Any,
        overflows: Overflows,
        spare_rows: SpareRows,
        templates: TemplateRenderer | None,
        grammars: GrammarChecker,
    ) -> None:
        self.client = core.client
        self._ranks = Ranks(core.client)
        self.overflows = overflows
        self.app = app
        self.args = args
        self.templates = templates
        self._children = [grammars] if templates is None else [templates, grammars]
        self._core = core
        self._heads: set[int] = set()
        """Ids of the adapters that change the output head."""
        self.modules: tuple[str, ...] = ()
        """The modules that weights by module have a row for, in this order; see `number_modules`."""
        self._spare_rows = spare_rows
        self.client.generate = special.refuse_prompts(self.client.generate, self._heads)
        staged = self.config.parallel_config.pipeline_parallel_size > 1
        self._loader = Loader(self._ranks, staged=staged, dtype=self.dtype)
        self._ids = itertools.count(1000)  # vLLM's warm-up uses small ids
        self._requests = itertools.count()
        self._dropping: set[asyncio.Task[None]] = set()

    @property
    def config(self) -> Any:
        """vLLM's full configuration."""
        return self.client.vllm_config

    @property
    def api_keys(self) -> tuple[str, ...]:
        """vLLM's own API keys (`--api-key`, `VLLM_API_KEY`), which the edge asks for."""
        return tuple(key for key in (self.args.api_key or [envs.VLLM_API_KEY]) if key)

    @property
    def dtype(self) -> torch.dtype:
        """What adapters are computed in: of the model's dtype and theirs, the one with the smaller range."""
        kinds: list[torch.dtype] = [self.config.model_config.dtype, self.config.lora_config.lora_dtype]
        return min(kinds, key=lambda kind: torch.finfo(kind).max)

    @property
    def cors(self) -> dict[str, Any]:
        """vLLM's flags for web pages of other sites, as Starlette's `CORSMiddleware` takes them."""
        return {
            "allow_origins": tuple(self.args.allowed_origins),
            "allow_credentials": self.args.allow_credentials,
            "allow_methods": self.args.allowed_methods,
            "allow_headers": self.args.allowed_headers,
        }

    @property
    def alive(self) -> bool:
        """False once an engine process has died."""
        return self._core.alive

    def death(self) -> str:
        """Why the engine died, as far as it could say."""
        return self._core.death()

    async def watch(self, limit_s: float) -> None:
        """Kill the engine when it answers nothing for `limit_s` seconds; returns once it is dead."""
        await self._core.watch(limit_s)

    async def load(self, path: Path, name: str) -> LoRARequest:
        """Load the adapter folder at `path` into every worker, before any request names it.

        Raises RuntimeError as `Loader.load` does.
        """
        request = LoRARequest(name, next(self._ids), str(path))
        try:
            if special.has_head(await self._loader.load(request)):
                self._heads.add(request.lora_int_id)
        except BaseException:  # some workers may have it, or get it when the engine goes on
            self._dropping.add(task := asyncio.create_task(self._drop(request)))
            task.add_done_callback(self._dropping.discard)
            raise
        return request

    async def _drop(self, request: LoRARequest) -> None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(DROP_TIMEOUT_S):
                await self.unload(request)

    async def unload(self, request: LoRARequest) -> None:
        """Free the adapter in every worker; the caller has drained its requests."""
        await self.client.remove_lora(request.lora_int_id)
        self._heads.discard(request.lora_int_id)

    @property
    def why_no_head(self) -> str | None:
        """Why LoRA on the output head would be served wrong by this engine, or None."""
        return special.why_no_head(self.config)

    @property
    def why_no_phases(self) -> str | None:
        """Why weights by position would be wrong on this engine, or None.

        With asynchronous drafts the workers know positions only once they have been computed.
        """
        return None if self.config.speculative_config is None else "with speculative decoding"

    async def number_modules(self, names: Sequence[str]) -> None:
        """Have row i of every table be for module `names[i]`, as adapters spell it; once, before any is used."""
        await self._ranks.call("fusion_number_modules", list(names))
        # Where a request will run is not known before: its rows are held in all engines.
        spare = [rows for workers in await self._ranks.call("fusion_spare_rows") for rows in workers]
        self._spare_rows.count = min((rows for rows in spare if rows is not None), default=None)
        self._spare_rows.modules = len(names)
        self.modules = tuple(names)

    async def special_layers(self) -> dict[str, str]:
        """The layers besides dense ones that vLLM adapts: their kind (`names.HEAD`, …) by its name."""
        engines = await self._ranks.call("fusion_special_layers")
        return {name: kind for workers in engines for worker in workers for name, kind in worker.items()}

    async def layers(self, request: LoRARequest) -> list[dict[str, int]]:
        """Per worker of every engine: the layers the adapter fills, with their rank."""
        engines = await self._ranks.call("fusion_adapter_layers", request.lora_int_id)
        return [layers for workers in engines for layers in workers]

    @property
    def engines(self) -> int:
        """How many engines of vLLM answer requests here (`--data-parallel-size`)."""
        return self._ranks.engines

    async def probe(
        self, prompt: Sequence[int], lora: LoRARequest | None, engine: int | None = None
    ) -> list[dict[int, float]]:
        """Log-probabilities of the likeliest tokens after `prompt`, one dict per step: prefill, then decodes; by the
        `engine` with this number, None for the one with the least to do.
        """
        sampling = probe_sampling(prompt[0], min(20, max(0, self.config.model_config.max_logprobs)))
        final = None
        async for output in self.client.generate(
            TokensPrompt(prompt_token_ids=list(prompt)),
            sampling,
            request_id=f"fusion-probe-{next(self._requests)}",
            lora_request=lora,
            data_parallel_rank=engine if self.engines > 1 else None,
        ):
            final = output
        assert final is not None
        assert final.outputs[0].logprobs is not None
        return [{t: entry.logprob for t, entry in step.items()} for step in final.outputs[0].logprobs]

    async def check_template(self, text: str) -> None:
        """Raise `TemplateError` unless a client's chat template may be used, and renders a short conversation.

        `TemplatesBusyError` when too many others are being rendered.
        """
        if self.templates is None:
            raise TemplateError(SWITCHED_OFF)
        await self.templates.check(text)

    async def close(self) -> None:
        """Stop the engine processes, and those that work on clients' texts."""
        for children in self._children:
            await asyncio.shield(children.close())
        await asyncio.shield(self._core.close())


async def start_engine(options: EngineOptions) -> Engine:
    """Start the engine and build vLLM's OpenAI app around it; ValueError on flags that do not fit."""
    check_version(vllm.__version__)
    if unproven := VERSIONS[public_version(vllm.__version__)].unproven:
        log.warning("vLLM %s: %s; the proof at start decides", vllm.__version__, unproven)
    os.environ[SERVER_PID] = str(os.getpid())
    os.environ[SLOT_WAIT_S] = str(options.slot_wait_s)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # As vLLM's own server does: a process with threads must not fork.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_MAX_N_SEQUENCES", str(MAX_N))
    return_freed_memory()
    os.environ.pop("VLLM_SERVER_DEV_MODE", None)  # development routes are never mounted
    args = parse_flags(options)
    prepare_cpu(options.extra, count_ranks(args))
    patches.install()
    core = await start_core(args)
    grammars = GrammarChecker(args.structured_outputs_config)
    try:
        if current_platform.is_cpu():
            # The engine's threads hold all cores: a second thread of a fusion would wait for a core at every product.
            # Under load a sum took 0.2 to 10 s with two threads, 0.1 to 0.4 s with one. The engine's own processes
            # have started.
            torch.set_num_threads(1)
        await grammars.start()
        tasks = await core.client.get_supported_tasks()
        spare_rows = SpareRows(options.slot_wait_s)
        overflows = patches.watch_client(core.client, grammars, tasks, spare_rows, options.gate_timeout_s)
        app = build_app(args, tasks, core.client.model_config)
        routes.keep_served(app)
        patches.remove_cors(app)
        patches.remove_key_check(app)
        await app_state.init_app_state(core.client, app.state, args, tasks)
        app.state.server = _Server()
        bound_validation(app.routes)
        renderer = core.client.renderer
        bound_text(renderer, core.client.model_config.max_model_len * renderer.get_tokenizer().max_chars_per_token)
        templates = await _start_templates(options.template_bytes)
        patches.render_client_templates(app.state.online_renderer, templates)
    except BaseException:
        await asyncio.shield(grammars.close())
        await asyncio.shield(core.close())
        raise
    return Engine(core, app, args, overflows, spare_rows, templates, grammars)


async def _start_templates(max_bytes: int | None) -> TemplateRenderer | None:
    if max_bytes is None:
        return None
    templates = TemplateRenderer(max_bytes)
    try:
        await templates.start()
    except BaseException:
        await templates.close()
        raise
    return templates
