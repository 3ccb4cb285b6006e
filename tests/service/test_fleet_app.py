"""What the application on Ray Serve is made of; `tests/service/test_ray_serve.py` runs it."""

from pathlib import Path

import pytest

from lora_fusion.cli import main
from service.fleet.app import Scale, build, check_keys
from service.settings import Settings, SettingsError


@pytest.mark.parametrize("scale", [Scale(0, 1), Scale(2, 1), Scale(target_ongoing=0)])
def test_counts_that_make_no_sense_are_refused(scale: Scale) -> None:
    with pytest.raises(SettingsError, match="expected 1 <= min_replicas"):
        scale.check(Settings())


def test_replicas_share_a_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FUSION_STORE", raising=False)
    monkeypatch.delenv("FUSION_DATABASE", raising=False)
    with pytest.raises(SettingsError, match=r"max_replicas=2 needs FUSION_DATABASE=postgresql"):
        build({"min_replicas": 1, "max_replicas": 2})
    shared = Settings(database="postgresql://h/d", store=str(tmp_path))
    Scale(2, 4).check(shared)
    Scale().check(Settings())


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FUSION_BASE", "some/base")
    monkeypatch.delenv("FUSION_STORE", raising=False)
    assert main(["serve-ray", "--min-replicas", "2"]) == 2
    assert "max_replicas=2 needs FUSION_DATABASE" in capsys.readouterr().err


def test_an_ingress_for_everybody_needs_a_key_or_a_plain_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    url = f"sqlite:///{tmp_path / 'registry.sqlite'}"
    with pytest.raises(SettingsError, match="is not a loopback address, and there is no API key"):
        check_keys(Settings(host="0.0.0.0", database=url))
    check_keys(Settings(host="127.0.0.1"))
    check_keys(Settings(host="0.0.0.0", keyless=True))
    monkeypatch.setenv("FUSION_DATABASE", url)
    assert main(["keys", "create", "--offline", "--role", "admin"]) == 0
    check_keys(Settings(host="0.0.0.0", database=url))


def test_arguments_of_a_file_are_checked() -> None:
    with pytest.raises(SettingsError, match=r"unknown arguments \['replicas'\]"):
        build({"replicas": 2})
