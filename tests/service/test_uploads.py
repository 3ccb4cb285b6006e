"""The routes of adapters over a fake engine: weights in a request, names in paths, replacement by vLLM's body."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import save as save_tensors

from adapters import LoraAdapter
from tests.adapters import samples
from tests.service.fetching import fetching, routed
from tests.service.shops import Shop
from tests.service.test_catalog import shop  # noqa: F401 - a fixture
from tests.service.test_replacement import digest, stored

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
RAW = {"content-type": "application/octet-stream"}


@pytest.fixture
async def http(shop: Shop) -> AsyncIterator[httpx.AsyncClient]:  # noqa: F811 - a fixture
    async with fetching(shop) as fetches, routed(shop, fetches) as client:
        yield client


def tensors(adapter: LoraAdapter) -> bytes:
    """What `safetensors.torch.save(get_peft_model_state_dict(model))` returns."""
    state = {}
    for name, module in adapter.modules.items():
        state[f"base_model.model.{name}.lora_A.weight"] = module.a.contiguous()
        state[f"base_model.model.{name}.lora_B.weight"] = module.b.contiguous()
    return save_tensors(state)


CONFIG = json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": samples.BASE})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("application/octet-stream", {"r": "3", "lora_alpha": "6"}),
        ("application/vnd.safetensors", {"config": CONFIG}),
        ("Application/X-Safetensors; x=y", {"config": CONFIG, "lora_alpha": "6.0", "use_rslora": "false"}),
        ("multipart", {"config": CONFIG}),
        ("multipart", {"r": "3", "lora_alpha": "6", "base_match": "name"}),
        ("application/octet-stream", {"config": CONFIG.replace("{", '{"lora_dropout": NaN, ', 1)}),  # A17
        ("application/octet-stream", {"config": '{"r": 3, "lora_dropout": NaN}', "lora_alpha": "6"}),  # A17
        ("config file", {}),
    ],
)
async def test_weights_come_without_a_disk(
    http: httpx.AsyncClient,
    shop: Shop,  # noqa: F811 - a fixture
    kind: str,
    said: dict[str, str],
) -> None:
    for seed, status, replace in ((0, 201, "false"), (1, 200, "true")):
        adapter = samples.adapter(seed, 3)
        fields = {"name": "org/policy@rl", "replace": replace, **said}
        if kind in ("multipart", "config file"):
            files = {"weights": tensors(adapter)} | ({"config": CONFIG.encode()} if kind == "config file" else {})
            answer = await http.post("/v1/adapters", data=fields, files=files)
        else:
            header = {"content-type": kind}
            answer = await http.post("/v1/adapters", params=fields, content=tensors(adapter), headers=header)
        assert answer.status_code == status, answer.text
        assert answer.json()["digest"] == adapter.digest
    assert stored(shop) == {adapter.digest}
    assert not list(Path(shop.catalog.settings.data).glob("upload-*"))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"r": "3", "lora_alpha": "6"}, "'name' is required"),
        ({"name": "p"}, "the weights come without r and lora_alpha: send the text of adapter_config.json"),
        ({"name": "p", "r": "3"}, "the weights come without lora_alpha"),
        ({"name": "p", "r": "x", "lora_alpha": "6"}, "'r' should be a valid integer"),
        (
            {"name": "p", "alpha": "6"},
            "'alpha': unknown key; known keys are name, replace, base_match, answer_only, config, r",
        ),
        ({"name": "p", "config": "{"}, "adapter_config.json cannot be read as JSON"),
        ({"name": "p", "config": "[]"}, "expected a JSON object"),
        ({"name": "p", "config": '{"r": 3, "r": 3}', "lora_alpha": "6"}, "has 'r' twice"),
        ({"name": "p", "config": '{"r": 3, "lora_alpha": 6, "use_dora": true}'}, "[dora]"),
        ({"name": "a b", "r": "3", "lora_alpha": "6"}, "not a valid name"),
    ],
)
async def test_weights_without_what_they_need_are_refused(
    http: httpx.AsyncClient, params: dict[str, str], words: str
) -> None:
    content = tensors(samples.adapter(0, 3))
    answer = await http.post("/v1/adapters", params=params, content=content, headers=RAW)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"r": "8"}, "r"), ({"config": CONFIG}, "config"), ({"lora_alpha": "1", "use_rslora": "true"}, "lora_alpha")],
)
async def test_what_an_archive_does_not_use_is_named(
    http: httpx.AsyncClient, fields: dict[str, str], param: str
) -> None:
    answer = await http.post("/v1/adapters", data={"name": "p", **fields}, files={"file": b"x"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], "goes with the part 'weights'" in error["message"]) == (param, True)


async def test_what_is_said_twice_is_refused(http: httpx.AsyncClient) -> None:
    content = tensors(samples.adapter(0, 3))
    answer = await http.post("/v1/adapters?name=p&name=q&r=3&lora_alpha=6", content=content, headers=RAW)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")
    answer = await http.post("/v1/adapters", files=[("name", (None, b"p"))] * 2 + [("file", ("a.tar", b"x"))])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")


async def test_bytes_that_are_no_weights_are_refused(http: httpx.AsyncClient) -> None:
    params = {"name": "p", "r": "3", "lora_alpha": "6"}
    for content in (b"", b"x", b"\xff" * 100, tensors(samples.adapter(0, 3))[:-4]):
        answer = await http.post("/v1/adapters", params=params, content=content, headers=RAW)
        assert answer.status_code == 400, answer.text


async def test_a_name_with_a_slash_has_its_own_place_in_a_path(http: httpx.AsyncClient, shop: Shop) -> None:  # noqa: F811 - a fixture
    for path in ("/v1/adapters/org%2Fadapter%40v1", "/v1/adapters/org/adapter@v1"):
        await shop.catalog.add("org/adapter@v1", shop.root / "wide")
        assert (await http.get(path)).json()["name"] == "org/adapter@v1"
        assert (await http.delete(path)).status_code == 204
        assert (await http.get(path)).status_code == (await http.delete(path)).status_code == 404


async def test_vllms_route_replaces_in_place(http: httpx.AsyncClient, shop: Shop) -> None:  # noqa: F811 - a fixture
    body: dict[str, Any] = {"lora_name": "org/policy", "lora_path": str(shop.root / "wide")}
    for _ in range(2):  # controllers try again until they have seen an answer
        assert (await http.post("/v1/load_lora_adapter", json=body)).status_code == 200
    body["lora_path"] = str(shop.root / "narrow")
    assert (await http.post("/v1/load_lora_adapter", json=body)).status_code == 409
    answer = await http.post("/v1/load_lora_adapter", json={**body, "load_inplace": True})  # B1
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'org/policy' added successfully.")
    body["lora_path"] = str(shop.root / "third")
    shop.engine.effect = 0.0
    answer = await http.post("/v1/load_lora_adapter", json={**body, "load_inplace": True})
    assert "It has no effect on a probe" in answer.text
    await shop.profiles.put("even", "0.5*`org/policy`")
    gone = {"lora_name": "org/policy"}
    assert (await http.post("/v1/unload_lora_adapter", json=gone)).status_code == 200  # B4
    assert (await http.post("/v1/unload_lora_adapter", json=gone)).status_code == 404
    assert digest(shop, "even")
