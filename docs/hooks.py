"""Links from a page to a file of the repository outside docs/: the site gets a copy of the file.

`../benchmarks/README.md` works on the forge as it is; in the site it becomes `repository/benchmarks/README.md`.
Links to folders become plain text. A package with lazy imports gets a reference page by its stub.
"""

import ast
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PLACE = "repository"
PACKAGE_BLOCK = re.compile(r"^::: (\w+)$(?:\n    .*)*", re.MULTILINE)
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s#]+)(#[^)\s]*)?\)")


def resolve(source: Path, target: str) -> Path | None:
    """The file or folder of the repository that `target` means in the page `source`; the README's page is the home."""
    if ":" in target:
        return None
    path = Path(os.path.normpath(source.parent / target))
    if path == ROOT / "README.md":
        return DOCS / "index.md"
    return path if path.is_relative_to(ROOT) and path.exists() else None


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to, and what those pages link to."""
    pages = sorted(DOCS.rglob("*.md"))
    seen: set[Path] = set()
    for page in pages:  # grows while it is walked
        for _, target, _ in LINK.findall(page.read_text()):
            path = resolve(page, target)
            if path is None or path in seen or path.is_dir() or path.is_relative_to(DOCS):
                continue
            seen.add(path)
            files.append(File.generated(config, f"{PLACE}/{path.relative_to(ROOT)}", abs_src_path=str(path)))
            if path.suffix == ".md":
                pages.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links to the copies."""
    place = Path(page.file.src_uri)
    copied = place.parts[0] == PLACE
    source = ROOT / place.relative_to(PLACE) if copied else DOCS / place

    def moved(match: re.Match[str]) -> str:
        path = resolve(source, match[2])
        if path is None:
            return match[0]
        if path.is_dir():
            return match[1].strip("[]")
        copy = path if path.is_relative_to(DOCS) else DOCS / PLACE / path.relative_to(ROOT)
        link = os.path.relpath(copy, (DOCS / place).parent)
        return f"{match[1]}({link}{match[3] or ''})"

    return LINK.sub(moved, PACKAGE_BLOCK.sub(list_public_names, markdown))


def list_public_names(match: re.Match[str]) -> str:
    """One mkdocstrings block for each public name of a package, by the stub beside its `__init__.py`."""
    package = match[1]
    stub = ast.parse((ROOT / package / "__init__.pyi").read_text())
    homes = {
        alias.name: f"{package}.{node.module}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return "\n\n".join(f"::: {home}.{name}" for name, home in sorted(homes.items()))
