"""Converters, the command line, and the quick look."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from transformers import AutoModelForCausalLM

import adapters
from training import convert
from training.__main__ import main
from training.config import ConfigError
from training.loop.model import base_name, load_tokenizer


@pytest.fixture
def finished(orders_recipe: Path, tmp_path: Path) -> Path:
    """A run's folder."""
    out = tmp_path / "run"
    assert main(["run", str(orders_recipe), "--out", str(out), "--set", "lora.rslora=true"]) == 0
    return out


def logits(model: torch.nn.Module, base: Path) -> torch.Tensor:
    ids = load_tokenizer(str(base))("some text to read", return_tensors="pt").input_ids
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(ids).logits
    return found


def test_a_run_leaves_all_that_it_was_made_from(finished: Path) -> None:
    assert {"config.json", "run.json", "metrics.jsonl", "checkpoints", "adapter"} == {
        p.name for p in finished.iterdir()
    }
    about = json.loads((finished / "run.json").read_text())
    assert about["command"].startswith("python -m training run") and set(about["versions"]) >= {"torch", "peft"}
    assert len(about["data"]["sha256"]) == 64 and about["processes"] == 1
    readme = (finished / "adapter/README.md").read_text()
    assert "orders:12" in readme and "rsLoRA" in readme and str(finished.parent) not in readme.split("```")[2]
    config = json.loads((finished / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["base_model_name_or_path"] == "tiny"
    assert base_name(f"{finished}/") == finished.name


def test_an_exported_checkpoint_opens_in_peft_and_merges_as_peft_does(
    finished: Path, tiny_base: Path, tmp_path: Path
) -> None:
    assert main(["export", str(finished), str(tmp_path / "a"), "--step", "2"]) == 0
    assert adapters.load(tmp_path / "a").digest != adapters.load(finished / "adapter").digest
    assert main(["export", str(finished), str(tmp_path / "merged"), "--merge", "--base", str(tiny_base)]) == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    plain = logits(base, tiny_base)
    wrapped = PeftModel.from_pretrained(base, str(finished / "adapter"))
    expected = logits(wrapped, tiny_base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tiny_base), expected, rtol=1e-4, atol=1e-5)
    assert float((expected - plain).abs().max()) > 1e-3
    assert load_tokenizer(str(tmp_path / "merged")).chat_template


def test_an_adapter_takes_the_place_of_an_older_one(finished: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert main(["resume", str(finished), "--export", str(tmp_path / "mine")]) == 0
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {convert.WEIGHTS, convert.CONFIG, convert.CARD}


def test_a_weight_that_the_base_uses_twice_is_not_merged(tiny_base: Path, tmp_path: Path) -> None:
    head = adapters.LoraModule(torch.ones(1, 32), torch.ones(load_vocabulary(tiny_base), 1), 1.0)
    adapters.save(adapters.make_adapter({"lm_head": head}, "tiny"), tmp_path / "head")
    with pytest.raises(ConfigError, match="'lm_head', whose weight the base uses elsewhere"):
        convert.merge(tmp_path / "head", tmp_path / "out", base=str(tiny_base))


def load_vocabulary(base: Path) -> int:
    return int(json.loads((base / "config.json").read_text())["vocab_size"])


@pytest.mark.parametrize("prefix", ["", "model.", "_fsdp_wrapped_module."])
def test_a_full_sharded_checkpoint_becomes_a_model_folder(tiny_base: Path, tmp_path: Path, prefix: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    state = {f"{prefix}{name}": value for name, value in base.state_dict().items()}
    dcp.save(state, checkpoint_id=str(tmp_path / "sharded"), no_dist=True)
    arguments = ["export", str(tmp_path / "sharded"), str(tmp_path / "out"), "--fsdp"]
    assert main(arguments) == 2
    assert main([*arguments, "--base", str(tiny_base)]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again, tiny_base), logits(base, tiny_base), rtol=0, atol=0)


def test_a_checkpoint_of_another_model_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    dcp.save({"model.layers.0.w": torch.ones(3)}, checkpoint_id=str(tmp_path / "other"), no_dist=True)
    with pytest.raises(ConfigError, match="is of another model"):
        convert.from_fsdp(tmp_path / "other", str(tiny_base), tmp_path / "out")
    with pytest.raises(ConfigError, match="is no sharded checkpoint"):
        convert.from_fsdp(tmp_path, str(tiny_base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(
    finished: Path, orders_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["run", str(tmp_path / "no.toml")], "no recipe at"),
        (["run", str(orders_recipe), "--out", str(finished)], "holds another run: resume it, or choose another --out"),
        (["run", str(orders_recipe), "--base", "nowhere", "--out", str(tmp_path / "n")], "python -m training.base"),
        (["run", str(orders_recipe), "--set", "lora.r=x", "--out", str(tmp_path / "n")], "lora.r is 'x'"),
        (
            ["run", str(orders_recipe), "--set", "data.path=no.jsonl", "--out", str(tmp_path / "n")],
            "no file 'no.jsonl'",
        ),
        (
            ["run", str(orders_recipe), "--set", "data.max_tokens=9999", "--out", str(tmp_path / "n")],
            "context has 2048",
        ),
        (["resume", str(tmp_path)], "holds no run"),
        (["export", str(tmp_path), str(tmp_path / "n")], "holds no run with a checkpoint"),
        (["export", str(finished), str(tmp_path / "n"), "--step", "3"], "no checkpoint of step 3: there are 2, 4"),
        (["export", str(finished), str(finished)], "exists already"),
        (["run", str(orders_recipe), "--export", str(finished.parent)], "only an adapter's own folder is replaced"),
        (["resume", str(finished), "--export", str(finished)], "only an adapter's own folder is replaced"),
        (["chat", str(tmp_path)], "adapter_config.json"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
        assert not (tmp_path / "n").exists()


def test_data_are_checked_before_a_run(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": ""}\n')
    assert main(["data", "check", str(path), "--base", str(tiny_base), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 2 and report["duplicates"] == ["rows.jsonl:2"] and report["empty"] == ["rows.jsonl:3"]
    assert main(["data", "check", str(path), "--base", str(tiny_base), "--against", str(path)]) == 0
    assert "1 rows have no answer" in capsys.readouterr().out


def test_an_adapter_answers_without_a_server(
    finished: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["chat", str(finished / "adapter"), "--base", str(tiny_base), "--prompt", "Hi", "--max-tokens", "8"]
    answers = []
    for weight in ("0", "300"):
        capsys.readouterr()
        assert main([*arguments, "--weight", weight]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]


class Service(BaseHTTPRequestHandler):
    """Stands in for the service only to give its two answers; the real one is in tests/service."""

    asked: list[dict[str, str]] = []  # noqa: RUF012 - one list for all of the handler's instances
    keys: list[str | None] = []  # noqa: RUF012 - as above

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        self.keys.append(self.headers["authorization"])
        good = body["name"] != "taken"
        content = json.dumps({"digest": "d1"} if good else {"error": {"message": "taken"}}).encode()
        self.send_response(201 if good else 409)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


def test_a_run_registers_its_adapter(
    orders_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = HTTPServer(("127.0.0.1", 0), Service)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    arguments = ["run", str(orders_recipe), "--set", "train.max_steps=1", "--register", url]
    try:
        export = ["--export", str(tmp_path / "mine")]
        assert main([*arguments, "--out", str(tmp_path / "r"), *export]) == 0
        assert Service.asked == [{"name": "mine", "path": str(tmp_path / "mine")}]
        monkeypatch.setenv("REGISTER_API_KEY", "secret")
        assert main([*arguments, "--out", str(tmp_path / "s"), "--name", "taken"]) == 2
        assert Service.keys == [None, "Bearer secret"]
        assert "refused the adapter" in capsys.readouterr().err
    finally:
        server.shutdown()
        server.server_close()
    assert main([*arguments[:-1], url, "--out", str(tmp_path / "t")]) == 2
    assert (tmp_path / "t/adapter/adapter_model.safetensors").exists()
