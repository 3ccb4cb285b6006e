"""What the long proofs share: their seed and size, and the file that says what they tried and what came out.

SOAK_SEED replays a run; SOAK_SIZE=short makes one of a minute or two; SOAK_LIMIT_S ends each proof after so many
seconds, and the result says how far it came.
"""

import json
import os
import random
import secrets
import time
from datetime import UTC, datetime
from typing import Any

from tests.conftest import ROOT

RESULT = ROOT / "benchmarks/results/reliability.json"
SEED = int(os.environ.get("SOAK_SEED") or secrets.randbits(32))
os.environ["SOAK_SEED"] = str(SEED)  # for the processes that a proof starts
IS_SHORT = os.environ.get("SOAK_SIZE") == "short"
LIMIT_S = float(os.environ.get("SOAK_LIMIT_S") or 0)


def size(full: int, short: int) -> int:
    """How much is to be done in this run."""
    return short if IS_SHORT else full


def make_draw(*part: object) -> random.Random:
    """The source of chance of one part of a run: the same for the same seed, whatever the others draw."""
    return random.Random("/".join(map(str, (SEED, *part))))


class Limit:
    """The time that a proof has."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    @property
    def is_over(self) -> bool:
        return 0 < LIMIT_S < self.seconds


def record(part: str, file: str, figures: dict[str, Any]) -> None:
    """Put what the proof in tests/service/`file` found into the result file; a short run replaces no long one."""
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    chosen = f"SOAK_SEED={SEED} " + "SOAK_SIZE=short " * IS_SHORT + f"SOAK_LIMIT_S={LIMIT_S:g} " * bool(LIMIT_S)
    head = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": f"{chosen}python -m pytest -m soak -s tests/service/{file}",
        "seed": SEED,
        "size": "short" if IS_SHORT else "full",
        "limit_s": LIMIT_S,
        "cores": len(os.sched_getaffinity(0)),
    }
    print(f"{part}: {json.dumps(head | figures)}", flush=True)
    if IS_SHORT and known.get(part, head)["size"] == "full":
        return
    RESULT.write_text(json.dumps(known | {part: head | figures}, indent=1) + "\n")
