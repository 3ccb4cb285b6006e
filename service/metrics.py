"""Prometheus series of the service, labeled by profile; all inline recipes share one label."""

from typing import Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from service.loaded_series import LoadedSeries

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One set of series, registered where vLLM's own are."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=SECONDS)

        self.builds = counter("fusion_builds", "Stacks and builds made, by outcome", "kind", "outcome")
        self.build_seconds = seconds("fusion_build_seconds", "Time to make a stack or build", "kind")
        self.load_seconds = seconds("fusion_load_seconds", "Time to load one into the engine")
        self.loaded = LoadedSeries(self.load_seconds.collect)
        registry.register(self.loaded)
        self.lookups = counter(
            "fusion_cache_lookups", "Fusions asked for: warm, loaded from the store, built", "source"
        )
        self.resident = Gauge("fusion_resident", "Warm in the engine", ["kind"], registry=registry)
        self.leases = Gauge("fusion_stack_requests", "Running requests", ["kind"], registry=registry)
        self.waiting = Gauge("fusion_waiting_requests", "Requests that wait for a stack or build", registry=registry)
        self.refusals = counter(
            "fusion_refusals",
            "Requests refused: too many wait (queue), waited too long (timeout), too many of a client, over a limit",
            "reason",
        )
        self.requests = counter("fusion_requests", "Requests, by profile and status", "profile", "status")
        self.tokens = counter("fusion_tokens", "Tokens, by profile and kind", "profile", "kind")
        self.overflows = counter("fusion_nonfinite_requests", "Requests ended because their numbers overflowed")
        self.registry = Gauge(
            "fusion_registry_current", "1, or 0 while the registry's database does not answer", registry=registry
        )
        self.gates = counter("fusion_gate_decisions", "Prompts whose weights a gate chose, or default", "outcome")
        self.first_token = seconds("fusion_time_to_first_token_seconds", "Until the first byte", "profile")

    def record_build(self, kind: str, outcome: str, build_s: float) -> None:
        """Count a stack or build that was written to the store (`built`) or not (`failed`), and the time it took."""
        self.builds.labels(kind, outcome).inc()
        self.build_seconds.labels(kind).observe(build_s)

    def record_load(self, seconds: float) -> None:
        """Count the time to load one into the engine."""
        self.load_seconds.observe(seconds)

    def set_resident(self, kind: str, count: int) -> None:
        """Set how many stacks or builds the engine holds."""
        self.resident.labels(kind).set(count)

    def record_refusal(self, reason: Literal["queue", "timeout", "client", "limit"]) -> None:
        """Count a request that was refused because there is no room for it now."""
        self.refusals.labels(reason).inc()

    def record_lookup(self, source: str) -> None:
        """Count a request by where its fusion came from: warm, loaded or built."""
        self.lookups.labels(source).inc()

    def forget(self, profile: str) -> None:
        """Drop the series of a deleted profile, which keeps their number bounded."""
        for metric in (self.requests, self.tokens, self.first_token):
            metric.remove_by_labels({"profile": profile})
