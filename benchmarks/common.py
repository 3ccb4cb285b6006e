"""What the benchmarks share: alternating pairs, medians with intervals, servers in processes of their own."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from math import comb
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self

import httpx

from eval_clients.shares import Share

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / ".cache/base/smollm2-135m-instruct"
BASE_NAME = "smollm2-135m-instruct"
RESULTS = Path(__file__).parent / "results"
START_LIMIT_S = 400
PAIRS = 7


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Distribution-free interval of the median from order statistics, at 95 % or the widest there is."""
    ordered, n = sorted(values), len(values)
    for k in range(n // 2, 0, -1):
        if 1 - 2 * sum(comb(n, i) for i in range(k)) / 2**n >= 0.95:
            return ordered[k - 1], ordered[n - k]
    return ordered[0], ordered[-1]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure: what was measured on both sides, pair by pair; the ratio is ours / peer."""

    name: str
    ours_is: str
    peer_is: str
    unit: str
    aim: tuple[Literal["<=", ">="], float]
    ours: tuple[float, ...]
    peer: tuple[float, ...]
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        """Of each pair."""
        return [a / b for a, b in zip(self.ours, self.peer, strict=True)]

    @property
    def met(self) -> bool:
        """Whether the median ratio reaches the aim."""
        sign, bound = self.aim
        value = median(self.ratios)
        return value <= bound if sign == "<=" else value >= bound

    def line(self) -> str:
        """A row of the table in README.md."""
        low, high = interval(self.ratios)
        return (
            f"| {self.name} | {median(self.ours):.3g} | {median(self.peer):.3g} {self.unit} "
            f"| **{median(self.ratios):.3g}** ({low:.3g}–{high:.3g}) | {self.aim[0]} {self.aim[1]:g} "
            f"| {'yes' if self.met else 'no'} | {len(self.ours)} |"
        )


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure of ours alone, a time or a size: run by run, the aim for its median."""

    name: str
    unit: str
    aim: float
    values: tuple[float, ...]
    note: str = ""

    def line(self) -> str:
        """A row of the table in README.md."""
        low, high = interval(self.values)
        value = median(self.values)
        met = "yes" if value <= self.aim else "no"
        return (
            f"| {self.name} | **{value:.3g}** ({low:.3g}–{high:.3g}) {self.unit} "
            f"| <= {self.aim:g} {self.unit} | {met} | {len(self.values)} |"
        )


MEASUREMENTS = "| figure of ours alone | median (interval) | aim | met | runs |\n| --- | --- | --- | --- | --- |"
HEADER = "| figure | ours | peer | ratio (interval) | aim | met | pairs |\n| --- | --- | --- | --- | --- | --- | --- |"


def alternate(ours: Callable[[], float], peer: Callable[[], float], pairs: int = PAIRS) -> dict[str, Any]:
    """Measure both sides in turn, who goes first changing from pair to pair; one unmeasured round before."""
    ours(), peer()
    taken: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            taken[side].append((ours, peer)[side]())
        print(f"    pair {i + 1}/{pairs}: {taken[0][-1]:.4g} against {taken[1][-1]:.4g}", flush=True)
    return {"ours": tuple(taken[0]), "peer": tuple(taken[1])}


def record(file: str, command: str, rows: Sequence[Comparison | Measurement]) -> None:
    """Print the rows; add them, dated, to `benchmarks/results/FILE`, replacing older ones of the same name."""
    path = RESULTS / file
    RESULTS.mkdir(exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    for row in rows:
        made = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "command": command, "machine": machine()}
        values = row.ratios if isinstance(row, Comparison) else row.values
        name = "ratio" if isinstance(row, Comparison) else "median"
        kept[row.name] = {**made, **asdict(row), name: median(values), "interval": list(interval(values))}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    for header, kind in ((HEADER, Comparison), (MEASUREMENTS, Measurement)):
        if lines := [row.line() for row in rows if isinstance(row, kind)]:
            print(header, *lines, sep="\n", flush=True)


def machine() -> str:
    """The kind of machine, without its name."""
    import torch  # not needed by what only starts servers

    gpu = f", one {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{os.cpu_count()} cores of {line.partition(':')[2].strip()}{gpu}"
    return f"{os.cpu_count()} cores, {platform.machine()}{gpu}"


def shown(value: Any) -> str:
    """A recorded value as a cell of a table: a share with its interval, anything else as it is."""
    if isinstance(value, dict):
        return str(Share(value["hits"], value["total"], value["low"], value["high"]))
    return str(value)


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Server:
    """A server process; `with` starts it and ends it and what it started."""

    command: list[str]
    cwd: Path
    ready_path: str
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    started_s: float = 0.0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        began = time.monotonic()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # else the server would outlive us
        # Both sides get both cores: vLLM would keep one of two free, which this service undoes by itself.
        cores = {"OMP_NUM_THREADS": str(os.cpu_count()), "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"} | cores
        environment.pop("PYTHONPATH", None)
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [part.replace("{port}", str(self.port)) for part in self.command],
                cwd=self.cwd,
                env=environment | {k: v.replace("{port}", str(self.port)) for k, v in self.environment.items()},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while time.monotonic() - began < START_LIMIT_S and self.process.poll() is None:
                with suppress(httpx.HTTPError):
                    if httpx.get(self.url + self.ready_path, timeout=5).status_code == 200:
                        self.started_s = time.monotonic() - began
                        return self
                time.sleep(0.1)
        except BaseException:  # Ctrl-C and SIGTERM too
            self.__exit__()
            raise
        self.__exit__()
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-3000:]}")

    def __exit__(self, *error: object) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


def stock(flags: Sequence[str], scratch: Path) -> Server:
    """vLLM's own server, in a folder where none of our code can be imported."""
    place = scratch / "stock"
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += ["--port", "{port}", "--model", str(BASE), "--served-model-name", BASE_NAME]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    return Server([*command, *flags], place, "/health", scratch / "stock.log", environment)


def ours(flags: Sequence[str], scratch: Path, **settings: str) -> Server:
    """The fusion service over the same base."""
    environment = {"FUSION_PORT": "{port}", "FUSION_BASE": str(BASE), "FUSION_DATA": str(scratch / "data")}
    environment |= {"FUSION_ENGINE_ARGS": " ".join(flags), "FUSION_ADAPTER_ROOTS": str(scratch)} | settings
    return Server([sys.executable, "-m", "service"], ROOT, "/readyz", scratch / "ours.log", environment)
