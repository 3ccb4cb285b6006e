"""`python -m service`: the service on FUSION_HOST:FUSION_PORT, as `make serve` starts it."""

import os
import sys
import tempfile
from collections.abc import Sequence

from service.json_logs import configure_vllm
from service.policy_rules import read_rules
from service.process import run_tree
from service.receipt_keys import read_receipt_key
from service.setting_tables import describe
from service.settings import START_FAILURE, Settings, SettingsError, read_settings
from service.temporary import hold_temporary_folder
from service.tracing import TraceSettingError, find_collector

KILL_AFTER_S = 5.0
"""After FUSION_DRAIN_S and FUSION_STOP_TIMEOUT_S, within which BentoML's supervisor ends its worker."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check the settings and run `bentoml serve` until it stops; says in one line why it could not start.

    Exit 0 stopped, 1 could not start or had to be killed, 2 invalid settings.
    """
    args = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(args):
        print(__doc__, describe(), sep="\n\n")
        return 0
    if args:
        message = f"error: unknown argument {args[0]!r}; settings are FUSION_* variables, see --help"
        print(message, file=sys.stderr)
        return 2
    try:
        settings = read_settings()
        read_rules(settings.policy)
        read_receipt_key(settings.receipt_key)
        find_collector()
        _prepare_data(settings)
        # A cache, which is to outlive the server; torch would put it into the temporary folder.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")
        with hold_temporary_folder() as folder:
            os.environ["TMPDIR"] = str(folder)
            if settings.log_format == "json":
                configure_vllm(folder)
            return _serve(settings)
    except (SettingsError, TraceSettingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _prepare_data(settings: Settings) -> None:
    """Make the data folder, and take away an earlier start's failure; SettingsError when it cannot be written."""
    failure = settings.data / START_FAILURE
    try:
        settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        failure.touch()
        failure.unlink()
    except OSError as error:
        raise SettingsError(
            f"FUSION_DATA={str(settings.data)!r} cannot be written: {error.strerror}; name a folder that this user owns"
        ) from error


def _serve(settings: Settings) -> int:
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "1")
    address = ["--host", settings.host, "--port", str(settings.port)]
    command = [sys.executable, "-m", "bentoml", "serve", "service.bento.app:LoraFusion", *address]
    code = run_tree(command, settings.drain_s + settings.stop_timeout_s + KILL_AFTER_S)
    failure = settings.data / START_FAILURE
    if failure.exists():
        print(f"error: the service could not run: {failure.read_text()}", file=sys.stderr)
        failure.unlink()
        return 1
    if code:
        print(f"error: the server ended with exit code {code}; the log above says why", file=sys.stderr)
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
