"""One command for everything: `lora-fusion serve`, `fuse`, `train`, `eval`, …

Each subcommand hands its arguments to the package that does the work, which is imported only then.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlencode

from adapters.recipes import did_you_mean
from lora_fusion import __version__


def _forward(module: str, *prefix: str, prog: str = "lora-fusion") -> Callable[[Sequence[str]], int]:
    """What runs the command line of `module`, with `prefix` before the arguments."""
    return lambda argv: import_module(module).main([*prefix, *argv], prog=prog)


def _prepare_to_serve(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Take every setting as a flag of `parser`, too, put them into the environment and create the default base if it
    is missing; returns all flags. Raises `SettingsError` and OSError.
    """
    from service.settings import PREFIX, Settings, read_settings
    from training.builtin.base import make_base

    settings = parser.add_argument_group("settings")
    for field in fields(Settings):
        flag = f"--{field.name.replace('_', '-')}"
        settings.add_argument(flag, metavar="VALUE", help=field.metadata["help"].replace("%", "%%"))
    flags = parser.parse_args(argv)
    for field in fields(Settings):
        if (value := getattr(flags, field.name)) is not None:
            os.environ[PREFIX + field.name.upper()] = value
    base = read_settings().base
    if base == Settings().base:
        make_base(Path(base))
    return flags


PRECEDENCE = "A flag overrides its FUSION_* variable, which overrides FUSION_CONFIG."


def _serve(argv: Sequence[str]) -> int:
    """Start the service; every setting is also a flag, and the default base is created if it is missing."""
    from service.__main__ import main
    from service.settings import SettingsError

    parser = argparse.ArgumentParser(prog="lora-fusion serve", description=f"Start the service. {PRECEDENCE}")
    try:
        _prepare_to_serve(parser, argv)
    except (SettingsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return main([])


def _serve_ray(argv: Sequence[str]) -> int:
    """Start replicas of the service on Ray Serve, with settings as for `serve`."""
    from service.settings import SettingsError

    parser = argparse.ArgumentParser(
        prog="lora-fusion serve-ray",
        description=f"Start replicas of the service on Ray Serve, until SIGTERM or Ctrl-C. {PRECEDENCE}",
    )
    parser.add_argument("--min-replicas", type=int, default=1, help="replicas that always run (1)")
    parser.add_argument("--max-replicas", type=int, help="replicas under load (as --min-replicas)")
    parser.add_argument("--target-ongoing", type=int, default=16, help="requests per replica to scale for (16)")
    parser.add_argument("--cpus", type=float, default=1, help="cores that Ray counts for a replica (1)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a replica (0)")
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="a running Ray cluster; else one starts and ends with this"
    )
    try:
        flags = _prepare_to_serve(parser, argv)
        names = ("min_replicas", "max_replicas", "target_ongoing", "cpus", "gpus")
        scale = {name: getattr(flags, name) for name in names}
        scale["max_replicas"] = flags.min_replicas if flags.max_replicas is None else flags.max_replicas
        import_module("service.fleet.environment").prepare_ray(is_alone=flags.address is None)
        import_module("service.fleet.app").run(scale, flags.address)
    except (SettingsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _settings(argv: Sequence[str]) -> int:
    """Print the settings of the service."""
    from service.setting_tables import describe, describe_json

    parser = argparse.ArgumentParser(prog="lora-fusion settings", description=_settings.__doc__)
    parser.add_argument("--json", action="store_true", help="as JSON instead of a Markdown table")
    print(describe_json() if parser.parse_args(argv).json else describe(), flush=True)
    return 0


def _ui(argv: Sequence[str]) -> int:
    """Open the page of a running service in the browser, and print its address."""
    import webbrowser

    parser = argparse.ArgumentParser(prog="lora-fusion ui", description=_ui.__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="the service's address (http://127.0.0.1:3000)")
    parser.add_argument("--recipe", default="", help="what the sliders show first")
    flags = parser.parse_args(argv)
    fragment = f"#mix?{urlencode({'recipe': flags.recipe})}" if flags.recipe else ""
    url = f"{flags.url.rstrip('/')}/{fragment}"
    print(url, flush=True)
    if not webbrowser.open(url):
        print("no browser could be opened: open the address above", file=sys.stderr)
    return 0


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: what runs it, its line of help, and the extra that installs the modules it needs."""

    run: Callable[[Sequence[str]], int]
    help: str
    extra: str = ""
    needs: tuple[str, ...] = ()


_TRAIN = _forward("training.cli", prog="lora-fusion train")
_EVAL = _forward("eval_clients.cli", prog="lora-fusion eval")
_SWEEP = _forward("eval_clients.cli", "sweep")
COMMANDS = {
    "serve": Command(_serve, "start the service", "cpu", ("bentoml", "sqlalchemy", "vllm")),
    "serve-ray": Command(
        _serve_ray, "start replicas of the service on Ray Serve", "cpu,ray", ("bentoml", "vllm", "ray")
    ),
    "verify": Command(
        _forward("service.receipt_cli", prog="lora-fusion verify"),
        "verify a receipt offline, or make its keys",
        "service",
        ("cryptography", "pydantic"),
    ),
    "ui": Command(_ui, "open the page of a running service"),
    "settings": Command(_settings, "list the settings of the service"),
    "keys": Command(
        _forward("service.keys_cli", prog="lora-fusion keys"),
        "make, list, rotate and revoke API keys",
        "cpu",
        ("sqlalchemy",),
    ),
    "audit": Command(
        _forward("service.audit_cli", prog="lora-fusion audit"), "check the audit of changes", "cpu", ("sqlalchemy",)
    ),
    "backup": Command(
        _forward("service.backup_cli", "backup"), "back up a server while it runs", "cpu", ("sqlalchemy",)
    ),
    "restore": Command(_forward("service.backup_cli", "restore"), "restore a backup", "cpu", ("sqlalchemy",)),
    "fuse": Command(_forward("adapters.cli", "fuse"), "fuse adapters into one, according to a recipe"),
    "plan": Command(_forward("adapters.cli", "plan"), "report what a recipe would cost, without writing anything"),
    "convert": Command(_forward("adapters.cli", "convert"), "make a plain adapter of one in another form"),
    "diff": Command(_forward("adapters.cli", "diff"), "compare two adapters"),
    "show": Command(_forward("adapters.cli", "show"), "describe an adapter"),
    "methods": Command(_forward("adapters.cli", "methods"), "list the fusion methods and their options"),
    "train": Command(_TRAIN, "train, resume, export and try adapters", "train", ("peft", "transformers")),
    "eval": Command(_EVAL, "run benchmarks against an endpoint", "eval", ("inspect_ai",)),
    "sweep": Command(_SWEEP, "measure a grid of recipes and choose the best point", "eval", ("inspect_ai",)),
}


def _overview() -> str:
    rows = "\n".join(f"  {name:<10}{command.help}" for name, command in COMMANDS.items())
    return f"usage: lora-fusion COMMAND …\n\n{rows}\n\n`lora-fusion COMMAND --help` says more."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for bad usage or a missing extra."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["--version"]:
        print(f"lora-fusion {__version__}")
        return 0
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0 if args else 2
    command = COMMANDS.get(args[0])
    if command is None:
        hint = did_you_mean(args[0], COMMANDS) or "`lora-fusion --help` lists the commands"
        print(f"error: unknown command {args[0]!r}: {hint}", file=sys.stderr)
        return 2
    missing = [name for name in command.needs if find_spec(name) is None]
    if missing:
        torch = "--torch-backend cpu " if "cpu" in command.extra else ""
        install = f"in a clone, install with `uv pip install {torch}'.[{command.extra}]'`"
        print(f"error: `lora-fusion {args[0]}` needs {', '.join(missing)}; {install}", file=sys.stderr)
        return 2
    try:
        return command.run(args[1:])
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
