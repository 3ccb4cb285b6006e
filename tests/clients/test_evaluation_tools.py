"""Evaluation and load tools as people run them: Inspect, lm-eval, `vllm bench serve`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.conftest import OWN_PYTHON, PROGRAMS, RECIPE, TIMEOUT_S, Run
from tests.conftest import BASE, BASE_NAME, Server

ROWS: list[dict[str, Any]] = [
    {"question": "The capital of France is", "choices": ["Paris", "iron"], "answer": 0},
    {"question": "Water boils when it is", "choices": ["hot", "purple"], "answer": 0},
]
DATA = """dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
doc_to_text: "{{question}}"
"""
CHOICE = (
    DATA
    + """task: choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
)
ANSWER = (
    DATA
    + """task: answer
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
"""
)


@pytest.fixture
def profile(server: Server) -> Iterator[str]:
    """A profile of the recipe: the `vllm/` provider takes only names that the server lists."""
    with server.http() as http:
        assert http.put("/v1/fusions/from-inspect", json={"fusion": RECIPE}).is_success
        yield "from-inspect"
        http.delete("/v1/fusions/from-inspect")


def test_inspect(run: Run, expected: str, profile: str) -> None:
    said = run("inspect_client.py", OWN_PYTHON)
    assert said["recipe"] == [expected, RECIPE]
    assert said["field"] == said["vllm field"] == [expected, BASE_NAME]
    assert said["vllm profile"] == [expected, profile]
    assert said["vllm adapter"][1] == "wide"


def lm_eval(folder: Path, kind: str, model: str, task: str, *options: str) -> list[Any]:
    """lm-eval's responses to each row of a task of its own."""
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    for name, text in (("choice", CHOICE), ("answer", ANSWER)):
        (folder / f"tasks/{name}.yaml").write_text(text.replace("ROWS", str(folder / "rows.json")))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", kind, "--model_args", model, "--tasks", task]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(folder / f"{kind}-{task}")]
    environment = os.environ | {"OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        [*command, "--log_samples", *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (samples,) = (folder / f"{kind}-{task}").rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: int(row["doc_id"]))
    return [row["filtered_resps"] for row in rows]


def echo(http: httpx.Client, text: str, skip: int) -> float:
    """The log-probability of what follows the first `skip` tokens of a text."""
    body = {"model": RECIPE, "prompt": text, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    answer = http.post("/v1/completions", json=body).json()
    return float(sum(answer["choices"][0]["logprobs"]["token_logprobs"][skip:-1]))


@pytest.mark.parametrize("tokenizer", ["huggingface", "remote"])
def test_lm_eval_completions(server: Server, small_server: Server, tmp_path: Path, tokenizer: str) -> None:
    """C13: the server that has `/tokenizer_info` needs no tokenizer on the client's side."""
    at, recipe = (server, RECIPE) if tokenizer == "huggingface" else (small_server, "0.6*task + 0.4*safety")
    local = f",tokenizer={BASE}" if tokenizer == "huggingface" else ""
    model = f"model={recipe},base_url={at.url}/v1/completions,tokenizer_backend={tokenizer}{local}"
    responses = lm_eval(tmp_path, "local-completions", model, "choice", "--batch_size", "1")
    assert [float(row[0][0]) > float(row[1][0]) for row in responses] == [True, True]
    if at is server:
        with server.http() as http:
            for row, answers in zip(ROWS, responses, strict=True):
                prompt = row["question"]
                skip = len(http.post("/tokenize", json={"prompt": prompt}).json()["tokens"])
                for choice, answer in zip(row["choices"], answers, strict=True):
                    assert abs(echo(http, f"{prompt} {choice}", skip) - float(answer[0])) < 1e-3


def test_lm_eval_chat_completions(server: Server, tmp_path: Path) -> None:
    model = f"model={RECIPE},base_url={server.url}/v1/chat/completions"
    (first, second) = lm_eval(tmp_path, "local-chat-completions", model, "answer", "--apply_chat_template")
    assert first[0]
    assert second[0]


def test_vllm_bench_serve(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAMS / "bench_client.py"), "--base-url", server.url, "--model", BASE_NAME]
    command += ["--tokenizer", str(BASE), "--dataset-name", "random", "--random-input-len", "16", "--num-prompts", "4"]
    command += ["--random-output-len", "4", "--lora-modules", "wide", RECIPE, "--lora-assignment", "round-robin"]
    command += ["--save-result", "--result-filename", "bench.json", "--disable-tqdm", "--seed", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (4, 16)
