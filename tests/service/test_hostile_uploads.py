"""Uploads that would stop everybody: refused, or read, while the server goes on answering others."""

import json
import struct
import time
from pathlib import Path

import httpx
import pytest
import torch

from adapters import LoraModule, make_adapter, save
from tests.adapters.samples import CONFIG, WEIGHTS
from tests.adapters.test_archive import HOSTILE, member
from tests.conftest import Server
from tests.ticks import watch

ANSWER_S = 5
"""Within this an attack is answered, and so is everybody else meanwhile; the attacks took minutes, or had no end."""


def send(server: Server, archive: bytes) -> httpx.Response:
    """Upload it, while `/livez` is asked all the time."""
    with server.http() as http, httpx.Client(base_url=server.url, timeout=ANSWER_S) as other:
        start = time.monotonic()
        with watch(lambda: other.get("/livez").raise_for_status(), clock=time.monotonic) as ticks:
            answer = http.post(
                "/v1/adapters", data={"name": "hostile"}, files={"file": archive}, headers={"x-fusion-upload": "1"}
            )
        assert time.monotonic() - start < ANSWER_S
        assert ticks.count
        assert ticks.longest_s < ANSWER_S
    return answer


def pack(folder: Path, **changed: bytes) -> bytes:
    files = {CONFIG: (folder / CONFIG).read_bytes(), WEIGHTS: (folder / WEIGHTS).read_bytes()}
    return b"".join(member(name.encode(), content) for name, content in (files | changed).items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    module = LoraModule(torch.ones(8, 4), torch.ones(4, 8), 1.0)
    save(make_adapter({"a" * 80: module}, None), tmp_path / "one")
    return tmp_path / "one"


@pytest.mark.parametrize("pattern", ["(.|.)" * 50 + "x", ".?" * 200 + "x", "((a+)?)+b", "(a" * 100])
def test_a_pattern_of_an_upload_stops_nobody(server: Server, folder: Path, pattern: str) -> None:
    config = json.loads((folder / CONFIG).read_text()) | {"rank_pattern": {pattern: 8}}
    answer = send(server, pack(folder, **{CONFIG: json.dumps(config).encode()}))
    assert answer.status_code == 400
    assert len(answer.json()["error"]["message"]) < 600


@pytest.mark.parametrize("size", [40_000, 4_000_000])
def test_dimensions_of_a_tensor_stop_nobody(server: Server, folder: Path, size: int) -> None:
    head = b'{"a":{"dtype":"F32","shape":[' + b"140737488355327," * (size // 16) + b'1],"data_offsets":[0,4]}}'
    answer = send(server, pack(folder, **{WEIGHTS: struct.pack("<Q", len(head)) + head + bytes(4)}))
    assert answer.status_code == 400
    assert len(answer.json()["error"]["message"]) < 600


@pytest.mark.parametrize("case", ["loop", "negative", "sparse", "pax digits", "empty members"])
def test_an_archive_stops_nobody_and_fills_no_disk(server: Server, case: str) -> None:
    content, words = HOSTILE[case]
    answer = send(server, content)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert not list(server.data.glob("upload-*"))


@pytest.mark.parametrize("charset", ["undefined", "punycode"])
def test_a_charset_of_an_upload_stops_nobody(server: Server, charset: str) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\n' + b"a" * 950_000 + b"-" + b"b" * 50_000
    head = {"x-fusion-upload": "1", "content-type": f"multipart/form-data; boundary=x; charset={charset}"}
    with server.http() as http:
        start = time.monotonic()
        answer = http.post("/v1/adapters", content=part + b"\r\n--x--\r\n", headers=head)
    assert answer.status_code == 415
    assert time.monotonic() - start < ANSWER_S
