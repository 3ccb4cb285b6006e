"""Known attacks on a server, before and now: `python -m benchmarks.attacks COMMIT [--only SCENE,…]`.

Each runs against the server of an earlier commit and of this one and notes how long others waited, or what became of
their answers. docs/security.md shows the record. Every wait is bounded: a server that has come to a stand is killed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks import servers
from benchmarks.attackers import ENGINE, SCENES, Target
from benchmarks.before import check_out
from benchmarks.common import BASE, RESULTS, ROOT, machine, stamp

COMMAND = "python -m benchmarks.attacks"
FILE = RESULTS / "attacks.json"


@dataclass(frozen=True, slots=True)
class Side:
    """A checkout whose servers are attacked, and the folder for their data."""

    tree: Path
    scratch: Path

    @contextmanager
    def serve(self, data: str, **settings: str) -> Iterator[Target]:
        """A server that is ready; it is killed at the end if it does not stop."""
        folder = self.scratch / data
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "FUSION_PORT": "{port}",
            "FUSION_BASE": str(BASE),
            "FUSION_DATA": str(folder / "data"),
            "FUSION_ENGINE_ARGS": ENGINE,
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        environment.pop("PYTHONPATH", None)
        process, url = servers.start(
            [sys.executable, "-m", "service"], environment | settings, self.tree, folder / "log"
        )
        servers.wait_ready(process, url, folder / "log")
        members = servers.family(process.pid)
        try:
            yield Target(url, process, folder / "data")
        finally:
            with suppress(subprocess.TimeoutExpired):
                process.send_signal(signal.SIGTERM)
                process.wait(20)
            for pid in {*members, *servers.family(process.pid)}:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def main() -> int:
    """Command line; exit 0 measured."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument("--only", default=",".join(SCENES), help="scenes to play; default: %(default)s")
    args = parser.parse_args()
    scenes = args.only.split(",")
    if unknown := set(scenes) - SCENES.keys():
        parser.error(f"unknown scenes {', '.join(sorted(unknown))}; expected {', '.join(SCENES)}")
    records = json.loads(FILE.read_text()) if FILE.exists() else {}
    with tempfile.TemporaryDirectory(prefix="attack-") as place, check_out(args.commit, Path(place, "tree")) as tree:
        sides = {"before": Side(tree, Path(place, "before")), "now": Side(ROOT, Path(place, "now"))}
        for scene in scenes:
            for name, side in sides.items():
                for attack, outcome in SCENES[scene](side.serve).items():
                    print(f"{attack}, {name}: {outcome}", flush=True)
                    row = records.setdefault(attack, {})
                    row |= {name: outcome, "commit": args.commit, **stamp(f"{COMMAND} {args.commit}")}
                    row["machine"] = machine()
            FILE.write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
