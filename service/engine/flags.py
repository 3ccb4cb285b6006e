"""vLLM's command line for this service: which flags it decides, which it refuses, what CPUs need."""

import json
import logging
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.cpu_resource_utils import get_visible_memory_node

from service.engine.base_folder import is_quantized
from service.engine.cli import cli
from service.engine.seam import SEAM_VERSION

log = logging.getLogger("fusion")
FEW_CORES = 4
CPU_KERNELS = 128
SPINS = 3000
"""How often a thread of the engine looks for its next operation before it sleeps."""
CPU_MEMORY_FLAGS = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
SCHEDULER = "service.engine.scheduler.make_scheduler"
LISTENING = {
    "--host": "set FUSION_HOST",
    "--port": "set FUSION_PORT",
    "--uds": "set FUSION_HOST and FUSION_PORT",
    "--ssl-": "put a reverse proxy that speaks TLS in front of the service",
}
"""vLLM's flags for the server it would run itself, which this service replaces, and what to do instead."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The flags this service decides; `extra` goes to vLLM's own parser unchanged."""

    model: str
    served_name: str
    max_lora_rank: int
    max_loras: int
    max_cpu_loras: int
    mixing: bool
    template_bytes: int | None = None
    """Largest text of a client's chat template; None: clients bring none."""
    extra: tuple[str, ...] = ()
    gate_timeout_s: float = 10.0
    slot_wait_s: float = 30.0
    """How long a request may wait for a slot of the batch."""


def slow_bfloat16() -> bool:
    """Whether this is an x86 CPU without bfloat16 instructions (there it is emulated, many times slower)."""
    if not current_platform.is_cpu() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    abilities = torch.cpu.get_capabilities()
    return not (abilities.get("avx512_bf16") or abilities.get("amx_tile"))


def count_ranks(args: Any) -> int:
    """How many workers vLLM's parsed `args` ask for on this machine."""
    engines = args.data_parallel_size if args.data_parallel_size_local is None else args.data_parallel_size_local
    ranks: int = engines * args.tensor_parallel_size * args.pipeline_parallel_size
    return max(1, ranks)


def prepare_cpu(extra: Sequence[str], ranks: int = 1) -> None:
    """Set the environment variables that vLLM's CPU workers read, unless the user has; `extra` are vLLM's flags, which
    ask for `ranks` workers.
    """
    if not current_platform.is_cpu():
        return
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))  # vLLM would compute on one thread
    if ranks > len(get_visible_memory_node()) and "VLLM_CPU_SIM_MULTI_NUMA" not in os.environ:
        # vLLM binds each worker's threads to a NUMA node of its own, and does not start with fewer nodes than workers.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if cores <= FEW_CORES:
        # vLLM reserves one core for its scheduler; with few cores that is too much, and the system shares them.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        # By default they look far more often, on cores that the server and its processes need.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    # oneDNN compiles a kernel for every number of tokens in a step and keeps 1,024 of some 100 KB each.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(CPU_KERNELS))
    if not any(flag.replace("_", "-").startswith(CPU_MEMORY_FLAGS) for flag in extra):
        # vLLM would take 92 % of the machine's memory, and not start where other processes use more than the rest.
        quarter = psutil.virtual_memory().available // 4 // ranks // 2**30
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, quarter)))
    # With LoRA, vLLM compiles nothing on CPUs but a small function that counts the ranks of tokens. That costs 4 to 8 s
    # of each start, and seconds in the midst of answers when the size of batches changes, for less than 1 ms a step.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def _check_device() -> None:
    if current_platform.is_unspecified():
        message = "this vLLM is the one for GPUs and finds none that it can use (`nvidia-smi` shows them)"
        raise ValueError(f"{message}; `make serve GPU=` serves on the CPU")


def parse_flags(options: EngineOptions) -> Any:
    """vLLM's validated arguments; ValueError for flags without effect, unknown or at odds with mixing, or no device."""
    _check_device()
    for given in options.extra:
        for flag, instead in LISTENING.items():
            if given.replace("_", "-").startswith(flag):
                raise ValueError(f"{given} in FUSION_ENGINE_ARGS has no effect: BentoML listens, not vLLM; {instead}")
    argv = [
        *("--model", options.model, "--served-model-name", options.served_name),
        *("--enable-lora", "--max-lora-rank", str(options.max_lora_rank)),
        *("--max-loras", str(options.max_loras), "--max-cpu-loras", str(options.max_cpu_loras)),
        # Also when nothing is mixed: on CPUs the seam's kernels are the faster and the safer ones.
        *("--worker-extension-cls", "service.engine.worker.FusionWorker"),
        *("--scheduler-cls", SCHEDULER),
        *("--scheduling-policy", "priority"),  # see `turns`
        "--enable-scale-out",  # its routes that are served: see `routes`
        *("--allowed-origins", "[]"),  # no web page of another site; the user's own flag comes later and wins
        *("--additional-config", json.dumps({"fusion_seam": SEAM_VERSION})),
        # The user's own --dtype comes later and wins. Kernels of most quantized weights take half precision only.
        *(("--dtype", "float32") if slow_bfloat16() and not is_quantized(options.model) else ()),
    ]
    try:
        args = cli.make_arg_parser(FlexibleArgumentParser()).parse_args([*argv, *options.extra])
    except SystemExit as error:  # argparse has printed what is wrong
        extra = " ".join(_hide_keys(options.extra))
        raise ValueError(f"vLLM rejects FUSION_ENGINE_ARGS={extra!r}; its message is above") from error
    if args.structured_outputs_config.backend == "auto":
        # The one backend with limits on a grammar's states and steps. xgrammar, vLLM's first choice, compiles 400 times
        # `.*` in a row for minutes, in the engine's only thread for it, and nothing ends that.
        args.structured_outputs_config.backend = "guidance"
        args.structured_outputs_config.disable_any_whitespace = True  # small bases would go on with line feeds
    if (backend := args.structured_outputs_config.backend) != "guidance":
        raise ValueError(
            f"the backend {backend!r} of --structured-outputs-config cannot be set: it compiles what clients want "
            "answers to match without limits of time and memory; leave it out, 'guidance' is taken then"
        )
    args.enable_per_request_metrics = not args.disable_log_stats  # answers say how long they took
    _refuse_ray(args)
    cli.validate_parsed_serve_args(args)
    if args.scheduler_cls != SCHEDULER:
        raise ValueError("--scheduler-cls cannot be set: this service's own ends requests whose numbers overflow")
    if args.trust_request_chat_template:
        raise ValueError(
            "--trust-request-chat-template cannot be set: a request's template would run without limits; "
            "set FUSION_CLIENT_TEMPLATES, and the template in a profile"
        )
    if options.mixing and (conflict := _mixing_conflict(args)):
        raise ValueError(f"{conflict} cannot be combined with mixing; set FUSION_MIXED=off or drop the flag")
    return args


def _refuse_ray(args: Any) -> None:
    """Raise ValueError where vLLM's workers cannot be Ray's; vLLM would say so only once it has started Ray."""
    if not current_platform.ray_device_key and "ray" in (args.distributed_executor_backend, args.data_parallel_backend):
        raise ValueError(
            f"Ray cannot run this engine's workers: vLLM's reason is 'current platform {current_platform.device_name} "
            "does not support ray'; leave --distributed-executor-backend and --data-parallel-backend out, vLLM starts "
            "processes then"
        )


def _hide_keys(extra: Sequence[str]) -> Iterator[str]:
    """`extra` without the values of `--api-key`, which no log may hold."""
    hidden = False
    for part in extra:
        if part.startswith("-"):
            flag, equals, _ = part.partition("=")
            hidden = flag.replace("_", "-").startswith("--api")  # argparse takes beginnings of flags, too
            yield f"{flag}=..." if hidden and equals else part
        else:
            yield "..." if hidden else part


def _mixing_conflict(args: Any) -> str | None:
    """Name of the flag that rules mixing out, or None (each one shards what the weights multiply).

    This vLLM's only sequence parallelism that shards tokens comes with expert parallelism.
    """
    conflicts = {
        "--fully-sharded-loras": args.fully_sharded_loras,
        "--enable-expert-parallel": args.enable_expert_parallel,
        "--prefill-context-parallel-size": (args.prefill_context_parallel_size or 1) > 1,
    }
    return next((flag for flag, on in conflicts.items() if on), None)
