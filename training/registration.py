"""Registration of an adapter with a running service, over HTTP."""

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

from training.errors import ConfigError

TIMEOUT_S = 300


def register(url: str, name: str, adapter: Path) -> str:
    """Make a running service load the adapter as `name`; returns its digest. ConfigError when it does not.

    The API key of a service that asks for one is taken from the environment variable REGISTER_API_KEY.
    """
    body = json.dumps({"name": name, "path": str(adapter.resolve())}).encode()
    headers = {"content-type": "application/json"}
    if key := os.environ.get("REGISTER_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/adapters", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            digest: str = json.load(response)["digest"]
            return digest
    except urllib.error.HTTPError as error:
        raise ConfigError(f"the service at {url} rejected the adapter: {error.read().decode()[:400]}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"no service answers at {url} ({error}): check it, or run `lora-fusion serve`") from None
