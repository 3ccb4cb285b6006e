"""Adapters as people have them, registered with the real server: accepted and told, or refused with the way out."""

import gzip
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import BASE, Server

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
Change = Callable[[Path], None]


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def configure(**keys: object) -> Change:
    def change(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **keys}))

    return change


def rename(old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        tensors = {name.replace(old, new, 1): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS)

    return change


ACCEPTED: Mapping[str, tuple[Change, str | None, int]] = {
    "A2, the served folder": (configure(base_model_name_or_path=str(BASE)), None, 0),
    "A3, the hub's name": (configure(base_model_name_or_path=HUB), HUB, 0),
    "A3, a folder elsewhere": (configure(base_model_name_or_path="/home/a/smollm2"), "…/smollm2", 0),
    "A4": (configure(bias="all"), None, 0),
    "A5": (configure(fan_in_fan_out=True), None, 0),
    "A8": (configure(rank_pattern={r".*\.layers\.\d+\..*\.v_proj": 8}), None, 0),
    "A9": (configure(init_lora_weights="lora_ga"), None, 1),
    "A18": (configure(target_modules=["q_proj"]), None, 1),
    "E1, compiled": (rename("layers", "_orig_mod.layers"), None, 1),
    "E1, another class": (rename("model.model.model", "model.model.language_model"), None, 1),
    "E1, without the model": (rename("model.model.model", "model.model"), None, 1),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_it_is_the_adapter_that_it_was(http: httpx.Client, server: Server, case: str) -> None:
    """All of them have the digest of the plain one, so the same numbers."""
    change, mismatch, notes = ACCEPTED[case]
    folder = server.adapters["wide"].parent / "wild"
    shutil.copytree(server.adapters["wide"], folder)
    try:
        change(folder)
        answer = http.post("/v1/adapters", json={"name": "wild", "path": str(folder)})
        assert answer.status_code == 201, answer.text
        assert answer.json()["digest"] == http.get("/v1/adapters/wide").json()["digest"]
        assert answer.json().get("base_mismatch") == mismatch
        assert len(answer.json().get("notes", [])) == notes
        assert http.delete("/v1/adapters/wild").status_code == 204
        if mismatch is None:
            return
        answer = http.post("/v1/adapters", json={"name": "wild", "path": str(folder), "base_match": "name"})
        assert answer.status_code == 400
        assert "FUSION_BASE_ALIASES" in answer.json()["error"]["message"]
        answer = http.post("/v1/load_lora_adapter", json={"lora_name": "wild", "lora_path": str(folder)})
        assert f"Its base is named {mismatch!r} (base_mismatch)" in answer.text
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "wild"}).status_code == 200
    finally:
        http.delete("/v1/adapters/wild")
        shutil.rmtree(folder)


def test_adapters_that_name_their_base_differently_are_mixed(http: httpx.Client, server: Server) -> None:
    """E3: every registered adapter has been compared with the base, whatever it calls it."""
    folder = server.adapters["wide"].parent / "spelled"
    shutil.copytree(server.adapters["pattern"], folder)
    tensors = {name: 0.9 * tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    try:
        configure(base_model_name_or_path=HUB)(folder)
        assert http.post("/v1/adapters", json={"name": "spelled", "path": str(folder)}).status_code == 201
        for fusion in ("0.5*spelled + 0.5*narrow", "svd(spelled + narrow, rank=4)"):
            body = {"model": fusion, "prompt": "Hello", "max_tokens": 1}
            assert http.post("/v1/completions", json=body).status_code == 200
        assert http.delete("/v1/adapters/spelled").status_code == 204
    finally:
        shutil.rmtree(folder)


def pack(folder: Path, mode: str) -> bytes:
    content = io.BytesIO()
    if mode == "zip":
        with zipfile.ZipFile(content, "w") as archive:
            for file in folder.iterdir():
                archive.write(file, file.name)
    else:
        with tarfile.open(fileobj=content, mode="w:") as tar:
            tar.add(folder, "out")
    return gzip.compress(content.getvalue()) if mode == "gzip" else content.getvalue()


@pytest.mark.parametrize(("mode", "words"), [("zip", "zip"), ("gzip", "gzip"), ("tar", "[pickle_only]")])
def test_what_is_no_plain_tar_of_safetensors_is_refused_with_the_way_out(
    http: httpx.Client, server: Server, tmp_path: Path, mode: str, words: str
) -> None:
    """A19."""
    folder = shutil.copytree(server.adapters["wide"], tmp_path / "out")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    files = {"file": pack(folder, mode)}
    answer = http.post("/v1/adapters", headers={"X-Fusion-Upload": "1"}, data={"name": "wild"}, files=files)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert words in message
    assert "lora-fusion convert" in message
    assert "upload-" not in message


def test_an_upload_can_insist_on_the_name(http: httpx.Client, server: Server, tmp_path: Path) -> None:
    folder = shutil.copytree(server.adapters["wide"], tmp_path / "out")
    configure(base_model_name_or_path=HUB)(folder)
    for match, status in (("name", 400), ("none", 400), ("shapes", 201)):
        answer = http.post(
            "/v1/adapters",
            headers={"X-Fusion-Upload": "1"},
            data={"name": "wild", "base_match": match},
            files={"file": pack(folder, "tar")},
        )
        assert answer.status_code == status, answer.text
    assert answer.json()["base_mismatch"] == HUB
    assert http.delete("/v1/adapters/wild").status_code == 204


def test_a_folder_of_adapters_names_those_in_it(http: httpx.Client, server: Server) -> None:
    """E6."""
    answer = http.post("/v1/adapters", json={"name": "wild", "path": str(server.adapters["wide"].parent)})
    assert answer.status_code == 400
    assert "give 'adapters/" in answer.json()["error"]["message"]
