"""One real server for all tests that need one: the shipped base in float32, test adapters made with PEFT."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from xdist.scheduler import LoadScopeScheduling

from benchmarks import servers
from service.receipt_keys import make_key
from tests.otlp import OtlpCollector, run_collector

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / ".cache/base/smollm2-135m-instruct"
BASE_NAME = "smollm2-135m-instruct"
EVAL_DATA = Path(os.environ.get("EVAL_DATA") or ROOT / "data")
"""Evaluation sets, which users bring; tests that read one are skipped without it."""
# 512 tokens a step make the longer prompts prefill in chunks.
ENGINE = "--dtype float32 --max-model-len 2048 --max-num-batched-tokens 512 --max-num-seqs 64"
family, stop, wait_ready = servers.family, servers.stop, servers.wait_ready
"""Used by the tests of every server."""


def take_cores() -> None:
    """Keep this process of pytest-xdist, with all that it starts, on its share of the cores: two engines on the same
    cores wait for each other's OpenMP threads, and take many times as long.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker:
        return
    if share := sorted(os.sched_getaffinity(0))[int(worker[2:]) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]:
        os.sched_setaffinity(0, share)
        os.environ["OMP_NUM_THREADS"] = str(len(share))


take_cores()


class Together(LoadScopeScheduling):
    """Has all tests of the two servers below run in one process of pytest-xdist, and those of any other file."""

    def _split_scope(self, nodeid: str) -> str:
        file = ROOT / nodeid.partition("::")[0]
        texts = (path.read_text() for path in (file, file.with_name("conftest.py")) if path.exists())
        return "servers" if any("server: Server" in text for text in texts) else str(file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    """Read by pytest-xdist. Its own `loadgroup` marks node ids in a way that pytest 9.2 no longer has."""
    return Together(config, log)


# The heavy libraries are imported where they are used: most tests need none of them.
def base_model() -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def make_adapters(folder: Path) -> dict[str, Path]:
    """Random adapters of every shape PEFT can give a LoRA, strong enough to be seen."""
    import torch
    from peft import LoraConfig, get_peft_model

    variety = {
        "wide": LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        "narrow": LoraConfig(r=2, lora_alpha=7, target_modules=["k_proj", "o_proj", "down_proj"]),
        "stable": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "gate_proj"]),
        "pattern": LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["v_proj", "up_proj"],
            rank_pattern={"layers.3.self_attn.v_proj": 6, "layers.9.mlp.up_proj": 1},
            alpha_pattern={"layers.9.mlp.up_proj": 11},
        ),
    }
    paths = {}
    for seed, (name, config) in enumerate(variety.items()):
        torch.manual_seed(seed)
        model = get_peft_model(base_model(), config)
        for parameter, value in model.named_parameters():
            if "lora_B" in parameter:
                torch.nn.init.normal_(value, std=0.02)
        model.peft_config["default"].base_model_name_or_path = BASE_NAME
        model.save_pretrained(folder / name)
        paths[name] = folder / name
    return paths


@dataclass(frozen=True)
class Server:
    """A running service: its address, adapters' folders, data folder and process."""

    url: str
    adapters: dict[str, Path]
    data: Path
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=300)


def launch(
    data: Path,
    roots: Path | str,
    log: Path,
    *,
    command: Sequence[str] = ("-m", "service"),
    cwd: Path = ROOT,
    before: Sequence[str] = (),
    **settings: str,
) -> tuple[subprocess.Popen[bytes], str]:
    """Start Python with `command` (`{port}` filled in) and `FUSION_*` settings; the process and its address.

    `before` is a command that executes it.
    """
    environment = {
        **os.environ,
        "FUSION_PORT": "{port}",
        "FUSION_DATA": str(data),
        "FUSION_BASE": str(BASE),
        "FUSION_ADAPTER_ROOTS": str(roots),
        "FUSION_ENGINE_ARGS": ENGINE,
        "FUSION_ADAPTERS": "",
        "FUSION_PROFILES": "",
        "VLLM_CPU_KVCACHE_SPACE": "2",
    } | settings
    return servers.start([*before, sys.executable, *command], environment, cwd, log)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    adapters = make_adapters(folder / "adapters")
    log = folder / "server.log"
    roots = f"{folder / 'adapters'}:{ROOT / 'examples/adapters'}:{ROOT / 'runs'}"
    process, url = launch(folder / "data", roots, log, FUSION_GROUPS="narrow+stable+wide")
    try:
        wait_ready(process, url, log)
        with httpx.Client(base_url=url, timeout=300) as http:
            for name, path in adapters.items():
                answer = http.post("/v1/adapters", json={"name": name, "path": str(path)})
                assert answer.status_code == 201, answer.text
        yield Server(url, adapters, folder / "data", process, log)
    finally:
        stop(process)


@pytest.fixture(scope="session")
def collector() -> Iterator[OtlpCollector]:
    """What takes the traces of `small_server`."""
    with run_collector() as running:
        yield running


@pytest.fixture(scope="session")
def small_server(tmp_path_factory: pytest.TempPathFactory, collector: OtlpCollector) -> Iterator[Server]:
    """A server whose limits are small and whose patience is short, to be attacked; it must stay healthy."""
    folder = tmp_path_factory.mktemp("small-server")
    log = folder / "server.log"
    policy = folder / "policy.toml"
    policy.write_text('apart = [{id = "kept-apart", adapters = ["task", "kept-apart"]}]\n')
    process, url = launch(
        folder / "data",
        ROOT / "examples/adapters",
        log,
        FUSION_ADAPTERS="task=shipped:task,safety=shipped:safety",
        FUSION_ENGINE_ARGS=f"{ENGINE} --enable-tokenizer-info-endpoint",
        FUSION_MAX_CPU_LORAS="4",
        FUSION_MAX_REQUESTS="32",
        FUSION_MAX_WAITING="8",
        FUSION_WAIT_TIMEOUT_S="3",
        FUSION_CLIENT_TIMEOUT_S="3",
        FUSION_LOOP_TIMEOUT_S="8",
        FUSION_STOP_TIMEOUT_S="10",
        FUSION_CLIENT_TEMPLATES="true",
        FUSION_POLICY=str(policy),
        FUSION_LOG_FORMAT="json",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_BSP_SCHEDULE_DELAY="200",
        FUSION_RECEIPT_KEY=str(make_key(folder / "receipts.pem")[0]),
        VLLM_CPU_KVCACHE_SPACE="1",
    )
    try:
        wait_ready(process, url, log)
        yield Server(url, {}, folder / "data", process, log)
    finally:
        stop(process)
