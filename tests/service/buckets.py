"""An S3 server on loopback, moto's, and what a server must be told to use it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "shared"
TABLE = '["s3://{}/"]\nendpoint = "{}"\nregion = "us-east-1"\naccess_key_id = "key"\nsecret_access_key = "secret"\n'


@contextmanager
def run_s3() -> Iterator[str]:
    """The address of a server; what is in it is the process's."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def make_bucket(endpoint: str) -> Iterator[Any]:
    """boto3's client, with the empty bucket BUCKET for the block."""
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    client: Any = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
    client.create_bucket(Bucket=BUCKET)
    yield client
    while found := list_keys(client):
        client.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": key} for key in found]})
    client.delete_bucket(Bucket=BUCKET)


def list_keys(client: Any, prefix: str = "") -> list[str]:
    """Of the first thousand objects."""
    return [each["Key"] for each in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]


def write_table(folder: Path, endpoint: str) -> Path:
    """The file of credentials for BUCKET."""
    file = folder / "credentials.toml"
    file.write_text(TABLE.format(BUCKET, endpoint))
    return file
