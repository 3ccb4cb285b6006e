"""Prometheus series by which routers find the replica that has an adapter: vLLM's, and those that are to follow it.

The names are not final upstream, so they stand in one table.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from service.engine.names import LORA_INFO

LOADED, LOADED_GPU, LOADED_CPU, MAX_GPU, LOAD_SECONDS = (
    "vllm:lora_adapter_loaded",
    "vllm:num_gpu_loaded_lora_adapters",
    "vllm:num_cpu_loaded_lora_adapters",
    "vllm:max_gpu_lora_adapters",
    "vllm:lora_adapter_load_seconds",
)
NAMES = {
    LORA_INFO: "Names that are loaded (as running) and asked for (as waiting), comma-separated; at Unix time",
    LOADED: "1 for each name that is loaded",
    LOADED_GPU: "Names that are loaded into slots of the batch",
    LOADED_CPU: "Names that are loaded, in slots or in memory",
    MAX_GPU: "Names that could be in slots of the batch, those that are there among them",
    LOAD_SECONDS: "Time to load a stack or build into the engine",
}
"""Every series with its description."""
INFO_LABELS = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
LOADED_LABELS = ("adapter_name", "level", "pinned", "rank")


@dataclass(frozen=True, slots=True)
class LoadedName:
    """A public name that is answered at once; `is_active`: its stack or build has a slot of the batch, as far as the
    server knows; `is_pinned`: it stays while there is other room.
    """

    name: str
    rank: int
    is_active: bool
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class Survey:
    """The names that are loaded, those that requests wait for, how many stacks and builds could be loaded at once, and
    how many slots of the batch no running request has.
    """

    loaded: tuple[LoadedName, ...]
    waiting: tuple[str, ...]
    room: int
    free_slots: int


class LoadedSeries(Collector):
    """The series, made whenever they are read; none without a `source`, that is, without an engine.

    `load_seconds` gives this server's own histogram of loads.
    """

    def __init__(self, load_seconds: Callable[[], Iterable[Metric]]) -> None:
        self.source: Callable[[], Survey] | None = None
        self._load_seconds = load_seconds

    def describe(self) -> Iterator[Metric]:
        """Names only, so that no other collector takes them."""
        yield from (
            HistogramMetricFamily(n, t) if n == LOAD_SECONDS else GaugeMetricFamily(n, t) for n, t in NAMES.items()
        )

    def collect(self) -> Iterator[Metric]:
        """The series now."""
        if (source := self.source) is None:
            return
        survey = source()
        active = sum(loaded.is_active for loaded in survey.loaded)
        running = ",".join(loaded.name for loaded in survey.loaded)
        # A router takes `running + waiting < max_lora` for room.
        listed = len(survey.loaded) + len(survey.waiting)
        info = GaugeMetricFamily(LORA_INFO, NAMES[LORA_INFO], labels=INFO_LABELS)
        info.add_metric((str(listed + survey.room), running, ",".join(survey.waiting)), time.time())
        yield info
        each = GaugeMetricFamily(LOADED, NAMES[LOADED], labels=LOADED_LABELS)
        for loaded in survey.loaded:
            each.add_metric(
                (loaded.name, "gpu" if loaded.is_active else "cpu", str(loaded.is_pinned).lower(), str(loaded.rank)), 1
            )
        yield each
        for name, value in (
            (LOADED_GPU, active),
            (LOADED_CPU, len(survey.loaded)),
            (MAX_GPU, active + survey.free_slots),
        ):
            yield GaugeMetricFamily(name, NAMES[name], value)
        yield self._rename_loads()

    def _rename_loads(self) -> Metric:
        loads = Metric(LOAD_SECONDS, NAMES[LOAD_SECONDS], "histogram")
        for metric in self._load_seconds():
            for sample in metric.samples:
                if not sample.name.endswith("_created"):
                    name = sample.name.replace(metric.name, LOAD_SECONDS)
                    loads.samples.append(Sample(name, sample.labels, sample.value))
        return loads
