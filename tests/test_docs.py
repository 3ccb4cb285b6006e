"""README and docs: every command and snippet runs or says why not; links, names, messages and tables are right."""

import argparse
import ast
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters import from_json, parse
from service.settings import read_settings
from tests.conftest import ROOT, Server
from training import load_recipe

README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
LINKED = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "deploy/README.md"))]
RUN, READ = ("bash", "console", "python", "toml"), ("json", "recipe", "text", "yaml")
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<why>.+?) -->\n)?^```(?P<language>.*)\n(?P<text>(?:.*\n)*?)^```$", re.MULTILINE
)
ADDRESS = "http://127.0.0.1:3000"
MIN_LITERAL = 10
"""Characters of a message that are always the same, below which it could be any."""
PACKAGES = ("adapters", "service", "training", "eval_clients", "lora_fusion")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block, and why it is not run, if it is not."""

    language: str
    text: str
    why: str | None


def blocks(page: Path, *languages: str) -> list[Block]:
    found = [Block(m["language"], m["text"], m["why"]) for m in FENCE.finditer(page.read_text())]
    return [block for block in found if not languages or block.language in languages]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page, "bash", "python") if block.why is None]


@pytest.fixture(scope="module")
def shipped(server: Server) -> Iterator[Server]:
    """The test server with what `lora-fusion serve` has, and, in the end, without what the pages left behind."""
    with server.http() as http:

        def names(kind: str) -> set[str]:
            return {row["name"] for row in http.get(f"/v1/{kind}").json()["data"]}

        before = {kind: names(kind) for kind in ("fusions", "adapters")}
        for adapter in ("task", "safety", "risk"):
            body = {"name": adapter, "path": str(ROOT / "examples/adapters" / adapter)}
            answer = http.post("/v1/adapters", json=body)
            assert answer.status_code == 201, answer.text
        assert http.put("/v1/fusions/balanced", json={"fusion": "0.6*task + 0.4*safety"}).status_code == 201
        yield server
        for kind, known in before.items():  # profiles first: they pin adapters
            for extra in names(kind) - known:
                assert http.delete(f"/v1/{kind}/{extra}").status_code == 204


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=name)
def test_what_a_page_shows_works(page: Path, shipped: Server, tmp_path: Path) -> None:
    for folder in ("examples", "training", ".cache"):  # what pages read; what they write lands beside it
        (tmp_path / folder).symlink_to(ROOT / folder)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    shell = ["bash", "-euo", "pipefail", "-c"]
    command = 'lora-fusion() { python -m lora_fusion "$@"; }\n'
    for block in runnable(page):
        text = block.text.replace(ADDRESS, shipped.url).replace("curl -s", "curl -sf")
        order = [*shell, command + text] if block.language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(order, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_what_it_is(page: Path) -> None:
    fences = re.findall(r"^```", page.read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(blocks(page))
    for block in blocks(page):
        assert block.language in (*RUN, *READ), block.text
        assert block.language != "console" or block.why is not None, "sessions are not run: write bash, or why not"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "toml", "json", "recipe")], ids=name)
def test_snippets_of_settings_and_recipes_are_valid(page: Path, tmp_path: Path) -> None:
    file = tmp_path / "snippet.toml"
    for block in blocks(page, "toml"):
        file.write_text(block.text)
        if "[data]" in block.text:
            assert load_recipe(file)[1] == [], "a setting has no effect"
        else:
            read_settings({"FUSION_CONFIG": str(file)})
    for block in blocks(page, "json"):
        content = json.loads(block.text)
        if "adapters" in content:
            from_json(content)
    for block in blocks(page, "recipe"):
        for line in block.text.splitlines():
            parse(re.sub(r"\s+#.*", "", line))


class Accepted(BaseException):
    """Raised in the place of carrying a command out; no `except Exception` takes it."""


def accepted(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether `python -m module` takes these arguments; nothing is carried out."""
    own = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        own(self, *args, **options)
        raise Accepted

    with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [module, *arguments])
        try:
            runpy.run_module(module, run_name="__main__")
        except Accepted:
            return True
        except SystemExit as error:
            return error.code in (0, None)  # --help
    return False


def resolve(words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a command line runs and its arguments; None for programs that are not ours."""
    end = next((i for i, word in enumerate(words) if word in ("|", "&&", ";", ">")), len(words))
    words = words[:end]
    if "lora-fusion" in words:
        return "lora_fusion", words[words.index("lora-fusion") + 1 :]
    if "-m" in words:
        module, *rest = words[words.index("-m") + 1 :]
        return (module, rest) if module.partition(".")[0] in (*PACKAGES, "benchmarks") else None
    return None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_exists_with_its_options(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks(page, "bash", "console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if re.match(r"(\w+=\S* )*(lora-fusion|python -m|torchrun|make) ", line):
                words = shlex.split(line, comments=True)
                assert words[0] != "make" or words[1] in targets, line
                command = resolve(words)
                assert command is None or accepted(*command, monkeypatch), line
    for span in re.findall(r"`((?:make|lora-fusion|python -m) [^`]+)`", FENCE.sub("", page.read_text())):
        words = span.split()
        if words[0] == "make":
            assert words[1] in targets, span
            continue
        command = resolve(words)
        assert command is not None, span
        module, rest = command
        verbs = [word for word in rest if re.fullmatch(r"[a-z]+", word)]
        assert accepted(module, [*verbs, "--help"], monkeypatch), span


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the forge and the site make them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    tops = "|".join((*PACKAGES, "benchmarks", "tests", "docs", "examples", "deploy", "requirements"))
    for path in re.findall(rf"`((?:{tops})/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def messages() -> list[str]:
    """Every text in the packages' code, with … for what is filled in."""
    found = []
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def fits_template(shown: str, message: str) -> bool:
    """Whether a message of the code reads as shown: in part, with … for values, or whole, with values filled in."""
    pieces = [piece for piece in re.split(r"'?…'?", shown.removeprefix("error: ")) if piece.strip()]
    if all(piece.strip() in message for piece in pieces):
        return True
    constant, literals = message.replace("…", "").strip(), message.split("…")
    if len(constant) < MIN_LITERAL or " " not in constant or not shown.startswith(literals[0]):
        return False
    return bool(re.match(".*".join(map(re.escape, literals)), shown))


def test_the_errors_of_the_faq_are_those_of_the_code() -> None:
    known = messages()
    rows = [line for line in (DOCS / "faq.md").read_text().splitlines() if line.startswith("| `")]
    cells = [re.split(r"(?<!\\)\|", row)[1].replace("\\|", "|") for row in rows]
    quoted = [message for cell in cells for _, message in re.findall(r"(``?)(.+?)\1", cell)]
    assert len(quoted) > 25
    assert [shown for shown in quoted if not any(fits_template(shown, message) for message in known)] == []


def test_the_site_builds_without_a_warning_and_asks_nobody_outside(tmp_path: Path) -> None:
    order = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(order, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, "WARNING" in done.stderr) == (0, False), done.stdout + done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)', page.read_text())
        loaded += re.findall(r'<link[^>]+href="(https?:[^"]+)', page.read_text())
        assert loaded == [], page.name


def test_the_readme_stays_short() -> None:
    assert len(README.read_text().splitlines()) <= 140


def test_every_promise_names_a_test_that_exists() -> None:
    promised = set(re.findall(r"`(test_\w+)`", (DOCS / "security.md").read_text()))
    written = {m for file in (ROOT / "tests").rglob("*.py") for m in re.findall(r"def (test_\w+)", file.read_text())}
    assert promised
    assert promised <= written, promised - written
