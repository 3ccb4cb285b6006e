"""A real engine that loads beside its answers: nobody's tokens change, and what is pinned stays."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.conftest import Server

TOLERANCE = 1e-3
MIX = "0.61*wide + 0.42*narrow"
NEW = [f"svd(0.{i}7*wide + 0.31*narrow, rank=2)" for i in range(2, 6)]
BODY = {"prompt": "An order of three chairs:", "temperature": 0, "ignore_eos": True, "logprobs": 0}


def ask(server: Server, model: str, tokens: int) -> list[float]:
    """Log-probabilities of the answer's tokens, streamed."""
    body: dict[str, Any] = {**BODY, "model": model, "max_tokens": tokens, "stream": True}
    values: list[float] = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                values += json.loads(line[6:])["choices"][0]["logprobs"]["token_logprobs"]
    return values


def test_answers_are_the_same_while_others_are_loaded_and_pins_stay(server: Server) -> None:
    alone = ask(server, MIX, 48)
    with ThreadPoolExecutor() as pool:
        streams = [pool.submit(ask, server, MIX, 48) for _ in range(2)]
        loaded = [ask(server, model, 8) for model in NEW]
        for stream in streams:
            assert stream.result() == pytest.approx(alone, abs=TOLERANCE)
    for model, values in zip(NEW, loaded, strict=True):
        assert ask(server, model, 8) == pytest.approx(values, abs=TOLERANCE)
    with httpx.Client(base_url=server.url, timeout=120) as http:
        assert http.put("/v1/fusions/kept", json={"fusion": NEW[0]}).status_code == 201
        try:
            status = http.put("/v1/fusions/kept/pin").json()
            assert (status["pinned"], status["state"], status["mode"]) == (True, "warm", "built")
            residents = http.get("/v1/state").json()["residents"]
            assert [one["evictable"] for one in residents if one["key"] == status["residence"]["key"]] == [False]
            assert 'adapter_name="kept"' in http.get("/metrics").text
            assert http.delete("/v1/fusions/kept/pin").status_code == 204
            assert http.get("/v1/fusions/kept/status").json()["pinned"] is False
        finally:
            assert http.delete("/v1/fusions/kept").status_code == 204
