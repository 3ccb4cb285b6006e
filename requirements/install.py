"""Install a pinned requirements file into a virtual environment: `install.py VENV FILE`.

`install.py VENV --lock` renews runtime.txt and dev.txt from their .in files instead.

uv does the work (pip backtracks for minutes on this set). PyTorch's CPU build is taken from the find-links
that pip is configured with when the wheel lies there, else from PyTorch's own CPU index.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
UV = "uv==0.13.9"


def pip_find_links(python: Path) -> list[str]:
    """The places pip is told to look in besides its index; uv does not read pip's configuration."""
    asked = subprocess.run([python, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True)
    return (os.environ.get("PIP_FIND_LINKS") or asked.stdout).split()


def torch_source(links: list[str]) -> list[str]:
    """uv flags that find torch's CPU wheel."""
    local = any(Path(link).is_dir() and list(Path(link).glob("torch-*cpu*.whl")) for link in links)
    flags = [flag for link in links for flag in ("--find-links", link)]
    return flags if local else [*flags, "--torch-backend", "cpu"]


def main() -> None:
    """Create the environment when it is missing, then install or lock."""
    folder, what = Path(sys.argv[1]), sys.argv[2]
    python = folder / "bin" / "python"
    if not python.exists():
        if sys.version_info < (3, 11):  # noqa: UP036 - the user's python, not the project's
            sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: set PYTHON=")
        print(f"creating {folder}", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", UV], check=True)
    uv = str(folder / "bin" / "uv")
    source = torch_source(pip_find_links(python))
    if what == "--lock":
        for name in ("runtime", "dev"):
            command = [uv, "pip", "compile", "-q", *source, "--override", str(HERE / "overrides.txt")]
            command += ["--no-emit-find-links", "--no-annotate", "--no-header", "-p", "3.11"]
            subprocess.run([*command, str(HERE / f"{name}.in"), "-o", str(HERE / f"{name}.txt")], check=True)
        return
    print(f"installing {what} (about 4 GB the first time)", flush=True)
    command = [uv, "pip", "install", "--python", str(python), "--no-deps", "--compile-bytecode", *source]
    subprocess.run([*command, "-r", what], check=True)


if __name__ == "__main__":
    main()
