"""`python -m service`: the service on FUSION_HOST:FUSION_PORT, as `make serve` starts it."""

import os
import sys

from service.settings import SettingsError, read


def main() -> None:
    """Check the settings, then become `bentoml serve`."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__, "\nEvery setting is a FUSION_* variable; see service/settings.py and the README.")
        return
    try:
        settings = read()
    except SettingsError as error:
        sys.exit(f"error: {error}")
    arguments = ["serve", "service.app:LoraFusion", "--host", settings.host, "--port", str(settings.port)]
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.pop("VLLM_SERVER_DEV_MODE", None)  # development routes are never mounted
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", *arguments])


if __name__ == "__main__":
    main()
