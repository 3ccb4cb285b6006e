"""Install a pinned requirements file into a virtual environment: `install.py VENV FILE`.

`install.py VENV --lock` renews the pins from the .in files instead, for the Python that runs it.

Every file must have one of the hashes in the set, and packages come as wheels, so that nothing runs while they are
installed. uv does the work (pip backtracks for minutes on this set). PyTorch's CPU build is taken from the find-links
that pip is configured with when the wheel lies there, else from PyTorch's own CPU index.
"""

import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
SETS = ("uv", "runtime", "cuda", "dev", "clients", "supply", "gemma3-270m")
ON_GPUS = "cuda"
"""The set with torch's CUDA build, as it lies on PyPI; all others have the CPU build."""
INTERPRETER = f"# CPython {'.'.join(platform.python_version_tuple()[:2])} on {platform.machine()}"
"""First line of a set: whom it was resolved for. Of torch, some sets have the hash of that one's wheel alone."""
FROM_SOURCE = ("rouge-score", "sqlitedict", "word2number")
"""Packages without a wheel; of the development set only."""


def pip_find_links(python: Path) -> list[str]:
    """The places pip is told to look in besides its index; uv does not read pip's configuration."""
    asked = subprocess.run([python, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True)
    return (os.environ.get("PIP_FIND_LINKS") or asked.stdout).split()


def torch_source(links: list[str]) -> list[str]:
    """uv flags that find torch's CPU wheel."""
    local = any(Path(link).is_dir() and list(Path(link).glob("torch-*cpu*.whl")) for link in links)
    flags = [flag for link in links for flag in ("--find-links", link)]
    return flags if local else [*flags, "--torch-backend", "cpu"]


def create_environment(folder: Path) -> None:
    """A virtual environment with uv in it."""
    print(f"creating {folder}", flush=True)
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--only-binary", ":all:"]
    subprocess.run([*pip, "--require-hashes", "-r", str(HERE / "uv.txt")], check=True)


def lock(uv: str, source: list[str]) -> None:
    """Renew every pinned set."""
    flags = ["--override", str(HERE / "overrides.txt"), "--generate-hashes", "--no-emit-find-links"]
    flags += ["--no-annotate", "--no-header", "-p", platform.python_version()]
    on_cpus = [*source, "--override", str(HERE / "overrides-cpu.txt")]
    for name in SETS:
        pins, where = HERE / f"{name}.txt", [] if name == ON_GPUS else on_cpus
        if name == "runtime":
            where = [*where, "--override", str(HERE / "overrides-serve.txt")]
        subprocess.run([uv, "pip", "compile", "-q", *where, *flags, HERE / f"{name}.in", "-o", pins], check=True)
        pins.write_text(f"{INTERPRETER}\n{pins.read_text()}")


def main() -> None:
    """Create the environment when it is missing, then install or lock."""
    folder, what = Path(sys.argv[1]), sys.argv[2]
    if sys.version_info < (3, 11):  # noqa: UP036 - the user's python, not the project's
        sys.exit(f"Python 3.11 or newer is needed, this is {platform.python_version()}: set PYTHON=")
    if not (folder / "bin" / "uv").exists():
        create_environment(folder)
    uv, python = str(folder / "bin" / "uv"), folder / "bin" / "python"
    source = [] if Path(what).stem == ON_GPUS else torch_source(pip_find_links(python))
    if what == "--lock":
        lock(uv, source)
        return
    pinned_for = Path(what).read_text().partition("\n")[0]
    if pinned_for != INTERPRETER:
        sys.exit(f"{what} is for {pinned_for[2:]}, this is {INTERPRETER[2:]}: set PYTHON=, or renew it by `make lock`")
    print(f"installing {what} (about 4 GB the first time)", flush=True)
    command = [uv, "pip", "install", "--python", str(python), "--no-deps", "--compile-bytecode", *source]
    command += ["--require-hashes", "--only-binary", ":all:"]
    command += [flag for name in FROM_SOURCE for flag in ("--no-binary", name)]
    subprocess.run([*command, "-r", what], check=True)


if __name__ == "__main__":
    main()
