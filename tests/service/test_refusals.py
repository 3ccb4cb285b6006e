"""Bad input: a clear error in OpenAI's shape, nothing lost, the server goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import BASE_NAME, Server

CHAT = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 1, "temperature": 0}
JSON = {"content-type": "application/json"}


@pytest.fixture
def http(server: Server) -> Any:
    with server.http() as client:
        yield client
        alive = client.post("/v1/chat/completions", json={**CHAT, "model": "0.5*wide + 0.5*narrow"})
        assert alive.status_code == 200, "the server stopped answering"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "wyde"}, 404, "'wide'"),
        ({"model": "0.5*wide + 0.5*narow"}, 404, "'narrow'"),
        ({"model": "0.5*wide + + narrow"}, 400, "position"),
        ({"model": "0.5*wide + 0.5*wide"}, 400, "wide"),
        ({"model": "1e999*wide"}, 400, "out of range"),
        ({"model": "17*wide"}, 400, "16"),
        ({"model": "nan*wide"}, 400, "position"),
        ({"model": "tise(1*wide + 1*narrow)"}, 400, "tise"),
        ({"model": "svd(1*wide)"}, 400, "rank"),
        ({"model": "svd(1*wide, rank=0)"}, 400, "rank"),
        ({"model": ""}, 400, "expected"),
        ({"model": 7}, 400, "must be a string, got 7"),
        ({"model": "../../etc/passwd"}, 404, "There is no model"),
        ({"model": "wide@1"}, 404, "'wide'"),
        ({"model": "wide", "fusion": "narrow"}, 400, "fusion"),
        ({"model": BASE_NAME, "fusion": 3}, 400, "fusion"),
        ({"model": BASE_NAME, "fusion": {"adapters": []}}, 400, "adapters"),
        ({"model": BASE_NAME, "fusion": {"adapters": [{"name": "wide", "weight": True}]}}, 400, "weight"),
        ({"model": "svd(1*wide + 1*stable, rank=1)", "strict": True}, 400, "strict"),
    ],
)
def test_bad_names_and_recipes_are_refused(http: httpx.Client, body: dict[str, Any], status: int, words: str) -> None:
    answer = http.post("/v1/chat/completions", json={**CHAT, **body})
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"defaults": {"temperature": "hot"}}, "defaults.temperature"),
        ({"defaults": {"temperature": -1}}, "defaults.temperature"),
        ({"defaults": {"top_p": 0}}, "defaults.top_p"),
        ({"defaults": {"max_tokens": True}}, "defaults.max_tokens"),
        ({"defaults": {"stop": [1]}}, "defaults.stop"),
        ({"defaults": {"chat_template": "{{ x }}"}}, "FUSION_CLIENT_TEMPLATES"),
        ({"defaults": {"stopp": "x"}}, "known keys are system, chat_template"),
        ({"defaults": ["x"]}, "defaults"),
        ({"default": {}}, "'default'"),
        ({"description": 3}, "description"),
    ],
)
def test_invalid_profiles_are_refused(http: httpx.Client, body: dict[str, Any], words: str) -> None:
    answer = http.put("/v1/fusions/never", json={"fusion": "wide", **body})
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
    assert http.get("/v1/fusions/never").status_code == 404


@pytest.mark.parametrize("raw", [b"{", b"[1, 2]", b'{"model": "wide"', b"\xff\xfe", b"[" * 100_000])
def test_bodies_that_are_not_json_are_refused(http: httpx.Client, raw: bytes) -> None:
    answer = http.post("/v1/chat/completions", content=raw, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("value", [b"NaN", b"1e999", b'"\\ud800"'])
def test_what_could_never_be_answered_with_is_not_stored(http: httpx.Client, value: bytes) -> None:
    body = b'{"fusion": "1*wide", "description": ' + value + b"}"
    assert http.put("/v1/fusions/never", content=body, headers=JSON).status_code == 400
    digest = "0" * 64
    refused = http.post(f"/v1/scorecards/{digest}", content=b'{"harm": ' + value + b"}", headers=JSON)
    assert refused.status_code == 400
    assert "JSON" in refused.json()["error"]["message"]
    assert http.get(f"/v1/scorecards/{digest}").json()["data"] == []
    assert http.get("/v1/fusions").status_code == 200


def test_only_existing_versions_can_be_named(http: httpx.Client) -> None:
    assert http.put("/v1/fusions/kept", json={"fusion": "1*wide"}).status_code == 201
    answer = http.post("/v1/chat/completions", json={**CHAT, "model": "kept@" + "1" * 4301})
    assert answer.status_code == 404
    assert "has no version" in answer.json()["error"]["message"]
    assert http.delete("/v1/fusions/kept@1").status_code == 400  # a version is not deleted by itself
    assert http.get("/v1/fusions/kept").status_code == 200
    assert http.delete("/v1/fusions/kept").status_code == 204


def test_other_methods_are_refused_in_the_shape_of_all_errors(http: httpx.Client) -> None:
    answer = http.post("/v1/models", json={})
    assert answer.status_code == 405
    assert "GET" in answer.json()["error"]["message"]


def test_nan_weights_in_json_are_refused(http: httpx.Client) -> None:
    raw = json.dumps({**CHAT, "model": BASE_NAME, "fusion": {"adapters": [{"name": "wide", "weight": "x"}]}})
    answer = http.post("/v1/chat/completions", content=raw.replace('"x"', "NaN"), headers=JSON)
    assert answer.status_code == 400


def damaged(source: Path, target: Path, how: str) -> Path:
    shutil.copytree(source, target)
    weights, config = target / "adapter_model.safetensors", target / "adapter_config.json"
    settings = json.loads(config.read_text())
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no config":
        config.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how in ("nan", "not lora", "no effect", "shape"):
        tensors = load_file(weights)
        key = next(k for k in tensors if "lora_B" in k)
        if how == "nan":
            tensors[key][0, 0] = torch.nan
        elif how == "shape":
            tensors[key] = tensors[key][:-1].clone()
        elif how == "no effect":
            tensors = {k: v if "lora_A" in k else torch.zeros_like(v) for k, v in tensors.items()}
        else:
            tensors = {"model.embed": torch.ones(2)}
        save_file(tensors, weights)
    else:
        changes = {
            "dora": {"use_dora": True},
            "other base": {"base_model_name_or_path": "another/model"},
            "head": {"modules_to_save": ["lm_head"]},
        }
        config.write_text(json.dumps(settings | changes[how]))
    return target


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "safetensors"),
        ("no config", "adapter_config.json"),
        ("no weights", "adapter_model.safetensors"),
        ("nan", "NaN"),
        ("not lora", "LoRA"),
        ("no effect", "no effect"),
        ("shape", "shape"),
        ("dora", "DoRA"),
        ("other base", "another/model"),
        ("head", "modules_to_save"),
    ],
)
def test_folders_that_are_not_adapters_are_refused(http: httpx.Client, server: Server, how: str, words: str) -> None:
    root = server.adapters["wide"].parent
    folder = damaged(server.adapters["wide"], root / f"bad-{how.replace(' ', '-')}", how)
    before = sorted(path.name for path in (server.data / "adapters").iterdir())
    insist = {"base_match": "name"} if how == "other base" else {}
    answer = http.post("/v1/adapters", json={"name": "bad", "path": str(folder), **insist})
    assert answer.status_code == 400, answer.text
    assert words.lower() in answer.json()["error"]["message"].lower()
    assert http.get("/v1/adapters/bad").status_code == 404
    assert sorted(path.name for path in (server.data / "adapters").iterdir()) == before, "its files were left behind"


@pytest.mark.parametrize("path", ["/etc", "../..", "", "no/such", "wide\0", "~"])
def test_paths_outside_the_roots_are_refused(http: httpx.Client, path: str) -> None:
    answer = http.post("/v1/adapters", json={"name": "out", "path": path})
    assert answer.status_code == 400


def test_a_symlink_out_of_the_roots_is_refused(http: httpx.Client, server: Server, tmp_path: Path) -> None:
    shutil.copytree(server.adapters["wide"], tmp_path / "outside")
    link = server.adapters["wide"].parent / "link"
    link.symlink_to(tmp_path / "outside")
    assert http.post("/v1/adapters", json={"name": "out", "path": str(link)}).status_code == 400


@pytest.mark.parametrize(
    "name", ["wide", BASE_NAME, "svd", "plan", "a//b", "../x", "a/..", "-a", "", "ä", "a" * 129, "~mix"]
)
def test_invalid_names_are_refused(http: httpx.Client, server: Server, name: str) -> None:
    path = str(server.adapters["narrow"])
    answer = http.post("/v1/adapters", json={"name": name, "path": path})
    assert answer.status_code == (409 if name in ("wide", BASE_NAME) else 400)


def test_a_source_folder_may_go_while_its_profile_is_in_use(http: httpx.Client, server: Server) -> None:
    root = server.adapters["wide"].parent
    folder = damaged(server.adapters["narrow"], root / "passing", "head")
    shutil.copy(server.adapters["narrow"] / "adapter_config.json", folder)
    assert http.post("/v1/adapters", json={"name": "passing", "path": str(folder)}).status_code == 201
    assert http.put("/v1/fusions/keeps", json={"fusion": "svd(0.5*passing + 1*wide, rank=5)"}).status_code == 201
    shutil.rmtree(folder)
    assert http.post("/v1/chat/completions", json={**CHAT, "model": "keeps"}).status_code == 200
    assert http.delete("/v1/fusions/keeps").status_code == 204
    assert http.delete("/v1/adapters/passing").status_code == 204
