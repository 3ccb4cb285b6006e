"""The command line: bad input in one line, data checks, a quick look, registration."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from training.cli import main


def test_bad_input_is_one_line(
    finished: Path, orders_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["run", str(tmp_path / "no.toml")], "there is no recipe"),
        (
            ["run", str(orders_recipe), "--out", str(finished)],
            "is not empty: continue it with `resume`, or choose another --out",
        ),
        (["run", str(orders_recipe), "--base", "nowhere", "--out", str(tmp_path / "n")], "or the default base"),
        (["run", str(orders_recipe), "--set", "lora.r=x", "--out", str(tmp_path / "n")], "lora.r is 'x'"),
        (
            ["run", str(orders_recipe), "--set", "data.path=no.jsonl", "--out", str(tmp_path / "n")],
            "no file 'no.jsonl'",
        ),
        (
            ["run", str(orders_recipe), "--set", "data.max_tokens=9999", "--out", str(tmp_path / "n")],
            "expected at most 2048",
        ),
        (["resume", str(tmp_path)], "is not a run: expected"),
        (["export", str(tmp_path), str(tmp_path / "n")], "is not a run with a checkpoint"),
        (
            ["export", str(finished), str(tmp_path / "n"), "--step", "3"],
            "no checkpoint of step 3: expected one of 2, 4",
        ),
        (["export", str(finished), str(finished)], "already exists"),
        (
            ["run", str(orders_recipe), "--export", str(finished.parent)],
            "only a folder with an adapter alone is replaced",
        ),
        (["resume", str(finished), "--export", str(finished)], "only a folder with an adapter alone is replaced"),
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
    assert report["rows"] == 2
    assert report["duplicates"] == ["rows.jsonl:2"]
    assert report["empty"] == ["rows.jsonl:3"]
    assert main(["data", "check", str(path), "--base", str(tiny_base), "--against", str(path)]) == 0
    assert "1 rows have no answer" in capsys.readouterr().out


def test_a_check_shows_rows_as_the_model_sees_them(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("Frage;Antwort;system;id\nHi\x1b[0m;Hello;Be kind.;7\n;;;\na;b\n")
    arguments = ["data", "check", str(path), "--base", str(tiny_base), "--columns", "prompt=Frage,answer=Antwort"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("--- rows.csv:2: 6 of ")
    assert "⟨<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi\\x1b[0m<|im_end|>\n<|im_start|>" in text
    assert "assistant\n⟩Hello<|im_end|>\n" in text
    assert "1 rows have no answer to learn and are left out: rows.csv:3" in text
    assert "1 rows cannot be read and are left out: rows.csv:4 does not have as many fields" in text
    assert "columns: 'Antwort' as answer, 'Frage' as prompt, 'system' as system\nnot used: 'id' (1 rows)" in text
    assert "rows.csv: the columns are separated by ';'" in text
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    ((masked, learned),) = (row["text"] for row in report["preview"])
    assert (masked["learned"], learned) == (False, {"text": "Hello<|im_end|>", "tokens": 6, "learned": True})
    assert report["unused"] == {"id": 1}
    assert main([*arguments, "--strict"]) == 2
    assert "error: rows.csv:4 does not have as many fields" in capsys.readouterr().err
    assert main([*arguments[:-1], "Frage"]) == 2
    assert "--columns 'Frage': expected PART=COLUMN" in capsys.readouterr().err


def test_a_run_takes_columns(orders_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "Hi", "b": "Hello", "c": 1}\n{"a": "Hi"}\n')
    arguments = ["run", str(orders_recipe), "--set", f"data.path={path}", "--set", "train.max_steps=1"]
    arguments += ["--columns", "prompt=a,answer=b", "--out"]
    assert main([*arguments, str(tmp_path / "strict"), "--strict"]) == 2
    assert "rows.jsonl:2 has the columns 'a': data.columns expects 'a', 'b'" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "run")]) == 0
    assert "not used: 'c' (1 rows)" in capsys.readouterr().out
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["data"]["columns"] == {"prompt": "a", "answer": "b"}


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
        """Log nothing."""


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
        assert "rejected the adapter" in capsys.readouterr().err
    finally:
        server.shutdown()
        server.server_close()
    assert main([*arguments[:-1], url, "--out", str(tmp_path / "t")]) == 2
    assert (tmp_path / "t/adapter/adapter_model.safetensors").exists()
