"""A 100 MB adapter from an S3 server on loopback to registered: `python -m benchmarks.sources [--pairs N]`.

The peers are the same machine's time to copy, hash and sync the bytes, and to register the same adapter from a folder.
"""

import argparse
import hashlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import boto3
import httpx
import torch
from moto.server import ThreadedMotoServer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapters.files import CONFIG, WEIGHTS
from benchmarks.common import BASE, BASE_NAME, PAIRS, Comparison, alternate, record
from benchmarks.servers import ours

COMMAND = "python -m benchmarks.sources"
ENGINE = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4")
RANK = 82
"""All linear layers of the default base at this rank take 100 MB in float32."""
LIMIT_S = 300.0
TABLE = '["s3://models/"]\nendpoint = "{}"\nregion = "us-east-1"\naccess_key_id = "key"\nsecret_access_key = "secret"\n'
SETTINGS = {"FUSION_ADAPTERS": "", "FUSION_PROFILES": "", "FUSION_MAX_LORA_RANK": "128", "FUSION_MAX_CPU_LORAS": "3"}
SETTINGS |= {"FUSION_SOURCES": "s3://models/", "FUSION_SOURCE_NETWORKS": "127.0.0.0/8"}


def make_adapter(folder: Path) -> int:
    """Write a random adapter of all linear layers; its bytes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.002)
    tuned.peft_config["default"].base_model_name_or_path = BASE_NAME
    tuned.save_pretrained(folder)
    return (folder / WEIGHTS).stat().st_size


@contextmanager
def serve_bucket(folder: Path) -> Iterator[str]:
    """moto's S3 with the adapter in the bucket `models`; its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else a line for each request
    server.start()
    try:
        host, port = server.get_host_and_port()
        client = boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="models")
        for name in (CONFIG, WEIGHTS):
            client.put_object(Bucket="models", Key=f"large/{name}", Body=(folder / name).read_bytes())
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def time_registration(http: httpx.Client, source: str, *, until_fetched: bool = False) -> float:
    """Seconds from the request to registered, or `until_fetched`; the adapter is deleted afterwards."""
    began = fetched = time.perf_counter()
    answer = http.post("/v1/adapters", json={"name": "large", "source": source})
    if answer.status_code == 202:
        while "digest" not in (card := http.get("/v1/adapters/large").json()):
            if card.get("state") in ("queued", "fetching"):
                fetched = time.perf_counter()
            if card.get("state") == "failed" or time.perf_counter() - began > LIMIT_S:
                raise RuntimeError(f"the adapter was not fetched: {card}")
            time.sleep(0.005)
    elif answer.status_code != 201:
        raise RuntimeError(f"the adapter was not registered: {answer.text}")
    took = (fetched if until_fetched else time.perf_counter()) - began
    http.delete("/v1/adapters/large").raise_for_status()
    return took


def time_copy(folder: Path, scratch: Path) -> float:
    """Seconds to copy, hash and sync the adapter's weights."""
    began = time.perf_counter()
    digest = hashlib.sha256()
    with (folder / WEIGHTS).open("rb") as source, (scratch / "copy").open("wb") as out:
        while chunk := source.read(2**20):
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    took = time.perf_counter() - began
    (scratch / "copy").unlink()
    return took


def main() -> int:
    """Command line; exit 0 measured."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="measurements of each side")
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        folder, table = scratch / "large", scratch / "credentials.toml"
        size = make_adapter(folder)
        with serve_bucket(folder) as endpoint:
            table.write_text(TABLE.format(endpoint))
            settings = SETTINGS | {"FUSION_SOURCE_CREDENTIALS": str(table)}
            with (
                ours(ENGINE, scratch, **settings) as server,
                httpx.Client(base_url=server.url, timeout=LIMIT_S) as http,
            ):
                measure(http, folder, scratch, size, pairs)
    return 0


def measure(http: httpx.Client, folder: Path, scratch: Path, size: int, pairs: int) -> None:
    """All rows."""
    note, source = f"{size} bytes of float32, rank {RANK}", "s3://models/large"
    copy, folder_is = "copying, hashing and syncing the bytes", "registering the same folder"
    rows = []
    for name, peer, fetch, run in (
        (
            "fetched",
            copy,
            partial(time_registration, http, source, until_fetched=True),
            partial(time_copy, folder, scratch),
        ),
        ("registered", copy, partial(time_registration, http, source), partial(time_copy, folder, scratch)),
        (
            "registered",
            folder_is,
            partial(time_registration, http, source),
            partial(time_registration, http, str(folder)),
        ),
    ):
        title = f"100 MB adapter from S3 on loopback to {name}, against {peer}"
        print(f"  {title}", flush=True)
        rows.append(Comparison(title, name, peer, "s", ("<=", 1.5), **alternate(fetch, run, pairs), note=note))
    record("sources.json", f"{COMMAND} --pairs {pairs}", rows)


if __name__ == "__main__":
    sys.exit(main())
