"""What is replaced in vLLM's API layer, in the server's process; `seam` does the same in the workers.

Names of mixes hold weights, so vLLM's model table and its statistics must not keep them. Each replaced name is
checked first: another vLLM is rejected with an error that names what is missing.
"""

from functools import cache
from typing import Any

from fastapi import FastAPI
from prometheus_client import Gauge
from starlette.middleware.cors import CORSMiddleware
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.tokenize.serving import TokenizerInfo
from vllm.renderers import hf
from vllm.v1.engine import output_processor
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import LoRARequestStates
from vllm.v1.structured_output import backend_guidance

from service.engine import slot_waits, tags, tokens
from service.engine.bodies import bound_grammars
from service.engine.budgets import reserve_tokens, watch_sequences
from service.engine.chat import choose_format, open_template, render_apart
from service.engine.core_process import run_engine_core
from service.engine.dry_run import input_check, stop_dry_runs
from service.engine.gate_passes import GateReader, ask_gates
from service.engine.grammars import GrammarChecker, skip_checked
from service.engine.logprobs import bound_logprobs
from service.engine.models import FusionModels, count_usage, meter
from service.engine.names import LORA_INFO
from service.engine.overflow import STOP_REASON, Ends, Overflows, raise_ends
from service.engine.ranks import Ranks
from service.engine.slot_waits import SlotsBusyError
from service.engine.spare_rows import SpareRows, hold_rows
from service.engine.stream_errors import pass_on, send_message_errors, send_response_errors
from service.engine.supported import UnknownVllmError, require
from service.engine.templates import TemplateRenderer
from service.engine.turns import Turns, take_turns


class _NoLoraStates(LoRARequestStates):
    """Keeps adapter names, which hold weights here, out of vLLM's metric labels."""

    def __init__(self, log_stats: bool = False) -> None:
        super().__init__(log_stats=False)


def _make_gauge(name: str, *args: Any, **options: Any) -> Gauge:
    """A gauge of vLLM's statistics; that of adapters is kept out of the registry, where `LoadedSeries` has its name."""
    return Gauge(name, *args, **options | ({"registry": None} if name == LORA_INFO else {}))


@cache
def install() -> None:
    """Replace vLLM's model table, adapter statistics, look at templates and grammars, description of the tokenizer,
    errors in streams and the engine core's start; once, however often this is called.
    """
    require(app_state, "OpenAIServingModels", "init_app_state")
    require(output_processor, "LoRARequestStates")
    require(PrometheusStatLogger, "_gauge_cls")
    require(hf, "resolve_chat_template_content_format")
    require(EngineCoreProc, "run_engine_core")
    require(backend_guidance, "validate_guidance_grammar")
    app_state.OpenAIServingModels = FusionModels  # type: ignore[misc]  # a class takes a class's place
    output_processor.LoRARequestStates = _NoLoraStates  # type: ignore[misc]  # as above
    PrometheusStatLogger._gauge_cls = staticmethod(_make_gauge)  # type: ignore[assignment]  # as above
    # By reference, as it goes to the new process, where vLLM's own is in its place.
    EngineCoreProc.run_engine_core = staticmethod(run_engine_core)  # type: ignore[method-assign]  # as above
    hf.resolve_chat_template_content_format = choose_format(hf.resolve_chat_template_content_format)  # type: ignore[assignment]  # as above
    _hide_tokenizer_paths()
    backend_guidance.validate_guidance_grammar = skip_checked(backend_guidance.validate_guidance_grammar)
    _install_stream_errors()
    tokens.install()
    tags.install()


def _install_stream_errors() -> None:
    responses: Any = OpenAIServingResponses
    messages: Any = AnthropicServingMessages
    converter = "_convert_generation_error_to_streaming_response"
    require(responses, "responses_stream_generator", converter)
    require(messages, "message_stream_converter")
    responses.responses_stream_generator = send_response_errors(responses.responses_stream_generator)
    setattr(responses, converter, pass_on)
    messages.message_stream_converter = send_message_errors(messages.message_stream_converter)


def _hide_tokenizer_paths() -> None:
    """Have `/tokenizer_info`, which names the tokenizer's files, say nothing of where they are on this machine."""
    require(TokenizerInfo, "to_dict")
    describe = TokenizerInfo.to_dict

    def describe_without_paths(info: TokenizerInfo) -> dict[str, Any]:
        return {
            key: value
            for key, value in describe(info).items()
            if key != "name_or_path" and not key.endswith(("_file", "_dir")) and not str(value).startswith("/")
        }

    TokenizerInfo.to_dict = describe_without_paths  # type: ignore[method-assign]  # as above


def remove_cors(app: FastAPI) -> None:
    """Take vLLM's CORS headers away: the edge adds them to all answers, not to those of vLLM's routes alone."""
    cors: object = CORSMiddleware
    remaining = [middleware for middleware in app.user_middleware if middleware.cls is not cors]
    if len(remaining) != len(app.user_middleware) - 1:
        raise UnknownVllmError("vLLM's app has not one CORSMiddleware: install the pins in requirements/")
    app.user_middleware[:] = remaining
    app.middleware_stack = None  # vLLM has built it already; it is built again at the first request


def remove_key_check(app: FastAPI) -> None:
    """Take vLLM's check of API keys away: the edge has made it, and knows keys that vLLM does not."""
    check: object = AuthenticationMiddleware
    app.user_middleware[:] = [middleware for middleware in app.user_middleware if middleware.cls is not check]
    app.middleware_stack = None


def watch_client(
    client: Any,
    grammars: GrammarChecker,
    tasks: tuple[Any, ...],
    spare_rows: SpareRows,
    gate_timeout_s: float,
) -> Overflows:
    """Have the engine client's `generate` reserve tokens, wait for its client's turn and for the rows of its phases,
    ask the request's gate first, bound each request's grammar and log-probabilities, report its tokens to the request
    it runs for, raise when its numbers overflowed, and compute nothing in a dry run; returns the count of overflows.
    """
    require(client, "generate", "model_config", "vllm_config", "output_processor")
    watch_sequences(client.output_processor)
    overflows = Overflows()
    vocabulary = client.model_config.get_vocab_size()
    generate = stop_dry_runs(hold_rows(client.generate, spare_rows), input_check(client, tasks))
    bounded = bound_logprobs(bound_grammars(generate, grammars), vocabulary)
    config, engines = client.vllm_config, Ranks(client).engines
    turns = Turns(config.scheduler_config.max_num_seqs * engines, config.lora_config.max_loras * engines)
    ends: Ends = {STOP_REASON: overflows.end, slot_waits.STOP_REASON: _end_slot_wait}
    reader = GateReader(raise_ends(bounded, {STOP_REASON: overflows.end}), gate_timeout_s)
    gated = ask_gates(count_usage(bounded), reader)
    in_turn = raise_ends(take_turns(gated, turns), ends)
    client.generate = reserve_tokens(in_turn, client.model_config.max_model_len)
    return overflows


def _end_slot_wait() -> SlotsBusyError:
    error = SlotsBusyError()
    if (sink := meter.get()) is not None:
        sink.refuse(str(error))
    return error


def render_client_templates(chats: Any, templates: TemplateRenderer | None) -> None:
    """Have vLLM's `OnlineRenderer` render profiles' chat templates by `templates`; None refuses them."""
    require(chats, "preprocess_chat", "renderer")
    # Other renderers than Hugging Face's have no templates.
    usable = templates if isinstance(chats.renderer, hf.HfRenderer) else None
    chats.preprocess_chat = open_template(chats.preprocess_chat, usable)
    if usable is not None:
        require(chats.renderer, "_apply_chat_template_async")
        chats.renderer._apply_chat_template_async = render_apart(chats.renderer._apply_chat_template_async, usable)
