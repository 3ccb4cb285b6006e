"""`python -m service`: the service on FUSION_HOST:FUSION_PORT, as `make serve` starts it."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from service.process import end_with_parent
from service.settings import START_FAILURE, SettingsError, describe, read_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Check the settings and run `bentoml serve` until it stops; says in one line why it could not start.

    Exit 0 stopped, 1 could not start, 2 invalid settings.
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
        settings.data.mkdir(parents=True, exist_ok=True)
    except (SettingsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failure = settings.data / START_FAILURE
    failure.unlink(missing_ok=True)
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "1")
    address = ["--host", settings.host, "--port", str(settings.port)]
    command = [sys.executable, "-m", "bentoml", "serve", "service.bento.app:LoraFusion", *address]
    server = subprocess.Popen(command, preexec_fn=end_with_parent)

    def forward(number: int, frame: FrameType | None) -> None:
        server.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    code = server.wait()
    if failure.exists():
        print(f"error: the service could not start: {failure.read_text()}", file=sys.stderr)
        failure.unlink()
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
