"""LiteLLM's proxy in front of a service, with keys of its own."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.servers import start
from tests.clients.conftest import CLIENTS, QUIET
from tests.conftest import stop, wait_ready

CONFIG = """
model_list:
  - model_name: "fusion/*"
    litellm_params:
      model: "hosted_vllm/*"
      api_base: {url}/v1
      api_key: os.environ/FUSION_API_KEY
litellm_settings: {{telemetry: false, num_retries: 0}}
general_settings: {{master_key: os.environ/LITELLM_MASTER_KEY}}
"""


@contextmanager
def run_gateway(folder: Path, url: str, key: str) -> Iterator[httpx.Client]:
    """A client of the proxy, which asks the service at `url` with `key`."""
    own = f"sk-{secrets.token_hex(8)}"
    (folder / "config.yaml").write_text(CONFIG.format(url=url))
    command = [str(CLIENTS / "bin/litellm"), "--config", str(folder / "config.yaml"), "--host", "127.0.0.1"]
    environment = os.environ | QUIET | {"LITELLM_MASTER_KEY": own, "FUSION_API_KEY": key}
    process, place = start([*command, "--port", "{port}"], environment, folder, folder / "gateway.log")
    try:
        wait_ready(process, place, folder / "gateway.log", "/health/liveliness")
        with httpx.Client(base_url=place, timeout=60, headers={"authorization": f"Bearer {own}"}) as http:
            yield http
    finally:
        stop(process)
