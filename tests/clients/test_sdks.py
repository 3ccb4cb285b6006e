"""SDKs as people install them: the fusion answers, errors arrive as the SDK's own."""

import pytest

from tests.clients.conftest import OWN_PYTHON, RECIPE, Run
from tests.conftest import BASE_NAME


@pytest.mark.parametrize("is_newest", [False, True])
def test_openai_python(run: Run, python: str, expected: str, is_newest: bool) -> None:
    """The version that the tests use, and the one beside LiteLLM and LangChain."""
    said = run("openai_client.py", python if is_newest else OWN_PYTHON)
    assert {said[way] for way in ("chat", "field", "stream", "response")} == {expected}
    assert said["mode"] == "mixed"
    assert said["models"] == [RECIPE]
    assert said["completion"]
    assert said["names"][0] == BASE_NAME
    assert said["retrieved"] == RECIPE
    assert "'wide'" in said["missing"]
    assert "temperature" in said["bad"]


def test_openai_node(run: Run, node: str, expected: str) -> None:
    said = run("openai_client.mjs", node)
    assert {said[way] for way in ("chat", "field", "stream")} == {expected}
    assert said["model"] == RECIPE
    assert said["names"][0] == BASE_NAME
    assert said["slash"] == 200  # C9: fetch follows
    assert "'wide'" in said["missing"]


def test_litellm(run: Run, python: str, expected: str) -> None:
    said = run("litellm_client.py", python)
    assert {said[way] for way in ("chat", "field", "stream", "routed")} == {expected}
    assert "'wide'" in said["missing"]


def test_langchain(run: Run, python: str, expected: str) -> None:
    said = run("langchain_client.py", python)
    assert {said["chat"], said["field"], said["stream"], *said["batch"]} == {expected}
    assert said["model"] == RECIPE


def test_java(run: Run, python: str, expected: str) -> None:
    said = run("java_client.py", python)
    assert (said["chat"], said["version"]) == (expected, "HTTP_1_1")  # C3
    assert (said["put"], said["delete"], said["models"]) == (201, 204, 200)
    assert said["head"] == 200  # C15
    assert said["slash"] == [307, "The path ends in a slash; use '/v1/models'."]  # C9
