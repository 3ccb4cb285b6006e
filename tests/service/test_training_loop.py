"""Names as people have them, and weights that change under one name at every step of a training: on the real server."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save

from adapters import parse
from tests.conftest import BASE_NAME, Server

NAMES = ["org/adapter", "org/adapter@v1", "7b-sql", "1730995200", "llama3:8b-sql.v2"]  # B3
ASK: dict[str, Any] = {"prompt": "The three largest rivers are", "max_tokens": 4, "temperature": 0, "logprobs": 1}
FOREIGN = {  # C7
    "HuggingFaceTB/SmolLM2-135M-Instruct": BASE_NAME,
    "openai/wide": "wide",
    "wide:latest": "wide",
    "acme/Narrow@main": "narrow",
}
STEPS = 6
RAW = {"content-type": "application/octet-stream", "x-fusion-upload": "1"}


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def ask(http: httpx.Client, model: str) -> list[float]:
    """Log-probabilities of an answer."""
    answer = http.post("/v1/completions", json={**ASK, "model": model})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return list(answer.json()["choices"][0]["logprobs"]["token_logprobs"])


def weights(server: Server, name: str, factor: float = 1.0) -> bytes:
    """The tensors of one of the server's adapters, its update times `factor`."""
    tensors = load_file(server.adapters[name] / "adapter_model.safetensors")
    return save({key: value * factor if ".lora_B." in key else value for key, value in tensors.items()})


def files(server: Server) -> tuple[int, int]:
    """Folders of adapters and of stacks and builds on the disk."""
    return tuple(len(list((server.data / place).iterdir())) for place in ("adapters", "builds"))  # type: ignore[return-value]  # two


@pytest.mark.parametrize("name", NAMES)
def test_a_name_works_wherever_names_do(http: httpx.Client, server: Server, name: str) -> None:
    body = {"name": name, "path": str(server.adapters["wide"])}
    assert http.post("/v1/adapters", json=body).status_code == 201
    try:
        assert ask(http, name) == ask(http, f'1*"{name}"') == ask(http, "wide")
        recipe = parse(f"0.5*`{name}` + 0.5*narrow")
        mixed = http.post("/v1/completions", json={**ASK, "model": f'0.5*"{name}"+.5*narrow'})
        assert mixed.headers["x-fusion-recipe"] == quote(recipe.format(), safe="*+(),=@ ")
        plain = http.post("/v1/completions", json={**ASK, "model": "0.5*wide + 0.5*narrow"})
        assert mixed.headers["x-fusion-digest"] == plain.headers["x-fusion-digest"]
        fusion = {"adapters": [{"name": name, "weight": 0.5}, {"name": "narrow", "weight": 0.5}]}
        plan = http.post("/v1/fusions/plan", json={"fusion": fusion}).json()
        assert plan["digest"] == plain.headers["x-fusion-digest"]
        assert name in [model["id"] for model in http.get("/v1/models").json()["data"]]
        for path in (quote(name, safe=""), name, quote(f"1*`{name}`", safe="")):
            assert http.get(f"/v1/models/{path}").json()["fusion"]["digest"] == plan_digest(http, "wide")
        assert http.put("/v1/fusions/team%2F7b", json={"fusion": f"0.5*`{name}` + 0.5*narrow"}).status_code == 201
        assert ask(http, "team/7b") == ask(http, "team/7b@1") == ask(http, "0.5*wide + 0.5*narrow")
        shown = http.get("/v1/fusions/team/7b@1/export").headers["content-disposition"]
        assert shown == 'attachment; filename="team-7b-1.tar"'
        assert http.delete("/v1/fusions/team/7b").status_code == 204
        named = [line for line in http.get("/metrics").text.splitlines() if f'"{name}"' in line]
        assert all(line.startswith("vllm:lora_adapter_loaded{") for line in named), "what is loaded, and no request"
    finally:
        assert http.delete(f"/v1/adapters/{quote(name, safe='')}").status_code == 204
    assert http.post("/v1/adapters", json=body).status_code == 201
    assert http.delete(f"/v1/adapters/{name}").status_code == 204


def plan_digest(http: httpx.Client, fusion: str) -> str:
    return str(http.post("/v1/fusions/plan", json={"fusion": fusion}).json()["digest"])


@pytest.mark.parametrize("model", FOREIGN)
def test_a_foreign_form_of_a_name_is_not_found(server: Server, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=1)
    assert f"did you mean '{FOREIGN[model]}'?" in str(caught.value)


def test_an_empty_model_is_named(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={**ASK, "model": ""})
    assert answer.status_code == 400  # C8
    assert f"'model' is empty: expected '{BASE_NAME}', an adapter" in answer.json()["error"]["message"]


def test_a_replaced_name_answers_with_its_new_weights_and_profiles_with_the_old(
    http: httpx.Client, server: Server
) -> None:
    def load(source: str) -> httpx.Response:
        body = {"lora_name": "org/policy", "lora_path": str(server.adapters[source]), "load_inplace": True}
        return http.post("/v1/load_lora_adapter", json=body)

    expected = {
        name: ask(http, name) for name in ("wide", "narrow", "0.5*wide + 0.5*stable", "0.5*narrow + 0.5*stable")
    }
    assert load("wide").status_code == 200
    assert http.put("/v1/fusions/pinned", json={"fusion": "0.5*`org/policy` + 0.5*stable"}).status_code == 201
    for source in ("narrow", "wide", "narrow"):
        assert load(source).status_code == 200  # B1
        assert ask(http, "org/policy") == expected[source]
        assert ask(http, "0.5*`org/policy` + 0.5*stable") == expected[f"0.5*{source} + 0.5*stable"]
        assert ask(http, "pinned") == expected["0.5*wide + 0.5*stable"]
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "org/policy"}).status_code == 200
    assert http.delete("/v1/fusions/pinned").status_code == 204


@pytest.mark.parametrize("way", ["replace", "unload"])
def test_steps_of_a_training_are_served_and_leave_nothing(http: httpx.Client, server: Server, way: str) -> None:
    config = (server.adapters["narrow"] / "adapter_config.json").read_text()
    query = {"name": "org/policy@rl", "config": config, "replace": str(way == "replace").lower()}
    ask(http, "1*narrow + 1*stable")
    before, seen = files(server), []
    for step in range(STEPS):
        content = weights(server, "narrow", 1 + step / STEPS)
        answer = http.post("/v1/adapters", params=query, content=content, headers=RAW)
        assert answer.status_code == (200 if step and way == "replace" else 201), answer.text
        seen.append(ask(http, "org/policy@rl"))
        ask(http, "0.5*`org/policy@rl` + 0.5*stable")
        if way == "unload":
            assert http.post("/v1/unload_lora_adapter", json={"lora_name": "org/policy@rl"}).status_code == 200
    assert len({tuple(values) for values in seen}) == STEPS
    assert torch.allclose(torch.tensor(seen[0]), torch.tensor(ask(http, "narrow")), atol=1e-5)
    if way == "replace":
        assert http.delete("/v1/adapters/org%2Fpolicy%40rl").status_code == 204
    after = files(server)
    assert after[0] == before[0]
    assert after[1] <= before[1] + 2, "those of the last step may still go"


def test_weights_alone_are_an_adapter_and_need_the_upload_s_header(http: httpx.Client, server: Server) -> None:
    query = {"name": "sent", "r": "8", "lora_alpha": "16"}
    content = weights(server, "wide")
    refused = http.post("/v1/adapters", params=query, content=content, headers={"content-type": RAW["content-type"]})
    assert refused.status_code == 415
    assert "must have the header 'X-Fusion-Upload: 1'" in refused.json()["error"]["message"]
    answer = http.post("/v1/adapters", params=query, content=content, headers=RAW)
    assert answer.status_code == 201, answer.text
    assert answer.json()["digest"] == http.get("/v1/adapters/wide").json()["digest"]
    assert json.loads(http.get("/v1/adapters/sent").text)["effect"] > 0
    assert http.delete("/v1/adapters/sent").status_code == 204
    assert not list(server.data.glob("upload-*"))
