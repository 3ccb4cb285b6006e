"""The names of vLLM that the engine's code needs, looked up in its sources."""

from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

from requirements.vllm_names import find_missing

SOURCES = {
    "vllm/__init__.py": "from .base import Base as Root\n",
    "vllm/base.py": """
class Base:
    def __init__(self):
        self.made = 1
    def act(self, one, two=None): ...
""",
    "vllm/v1.py": """
from vllm import Root
class Derived(Root):
    field: int
    @property
    def late(self): ...
""",
}
ENGINE = """
from vllm.v1 import Derived
from service.engine.supported import require

require(Derived, "act", "made", "field", "late")

class Own(Derived):
    def act(self, one, two=None): ...
"""


def lay(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def look(tmp_path: Path, old: str = "\0", new: str = "", engine: str = ENGINE) -> list[str]:
    """What is missing after `old` has become `new` in vLLM's sources."""
    texts = {name: text.replace(old, new) for name, text in SOURCES.items()}
    return find_missing(lay(tmp_path / "site", texts), lay(tmp_path / "engine", {"own.py": engine}))


def test_the_installed_vllm_has_every_name() -> None:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    assert find_missing(Path(spec.origin).parents[1]) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("class Derived", "class Other", "own.py:2 imports vllm.v1.Derived"),
        ("def act", "def do", "own.py:5 requires vllm.v1.Derived.act"),
        ("self.made", "made", "own.py:5 requires vllm.v1.Derived.made"),
        ("field: int", "pass", "own.py:5 requires vllm.v1.Derived.field"),
        ("def late", "def later", "own.py:5 requires vllm.v1.Derived.late"),
        ("two=None", "two=None, three=None", "own.py: the own act takes fewer arguments than vllm.v1.Derived.act"),
        ("class Derived(Root)", "class Derived", "own.py:5 requires vllm.v1.Derived.act"),
    ],
)
def test_what_another_release_has_no_more_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert look(tmp_path) == []
    assert said in look(tmp_path, old, new)


def test_an_owner_that_nothing_is_known_of_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"own\.thing"):
        look(tmp_path, engine=ENGINE + "\ndef patch(thing):\n    require(thing, 'name')\n")


def test_a_wheel_is_read_as_a_folder_is(tmp_path: Path) -> None:
    engine = lay(tmp_path / "engine", {"own.py": ENGINE})
    with ZipFile(tmp_path / "vllm-1.whl", "w") as wheel:
        for name, text in SOURCES.items():
            wheel.writestr(name, text.replace("def act", "def do"))
    assert find_missing(tmp_path / "vllm-1.whl", engine) == ["own.py:5 requires vllm.v1.Derived.act"]
    with pytest.raises(FileNotFoundError, match="a wheel of vLLM"):
        find_missing(engine)
