"""`lora-fusion ui`: the address it opens, and what it says where no browser is."""

import webbrowser

import pytest

from lora_fusion.cli import main


def test_the_command_opens_the_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    opened: list[str] = []

    def open_url(url: str) -> bool:
        opened.append(url)
        return True

    monkeypatch.setattr(webbrowser, "open", open_url)
    assert main(["ui", "--url", "http://127.0.0.1:3001/", "--recipe", "0.6*task + 0.4*safety"]) == 0
    assert opened == ["http://127.0.0.1:3001/#mix?recipe=0.6%2Atask+%2B+0.4%2Asafety"]
    assert main(["ui"]) == 0
    assert capsys.readouterr().out.splitlines() == [*opened[:1], "http://127.0.0.1:3000/"]


def test_without_a_browser_the_address_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    assert main(["ui"]) == 0
    said = capsys.readouterr()
    assert said.out == "http://127.0.0.1:3000/\n"
    assert "open the address above" in said.err
