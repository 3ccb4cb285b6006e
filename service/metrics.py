"""Prometheus series of the service, labeled by profile; all inline recipes share one label."""

from collections.abc import Callable
from typing import Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from service.histograms import LabeledHistogram
from service.loaded_series import LoadedSeries
from service.read_series import Mixes, ReadGauge
from service.uses import Uses

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOLERANCE = 1e-9
WEIGHTS = (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.5, 2, 4)


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
        self.ready = Gauge("fusion_ready", "1, or 0 while no request is answered: see /readyz", registry=registry)
        self.registry = Gauge(
            "fusion_registry_current", "1, or 0 while the registry's database does not answer", registry=registry
        )
        self.gates = counter("fusion_gate_decisions", "Prompts whose weights a gate chose, or default", "outcome")
        self._add_profiles(registry)
        self._add_policy(registry)

    def _add_profiles(self, registry: CollectorRegistry) -> None:
        def seconds(name: str, text: str) -> LabeledHistogram:
            return LabeledHistogram(name, text, "profile", SECONDS, registry=registry)

        self.first_token = seconds("fusion_time_to_first_token_seconds", "Until the first token")
        self.gaps = seconds("fusion_inter_token_seconds", "Between two tokens of an answer")
        self.request_seconds = seconds("fusion_request_seconds", "Until an answer's last byte")
        self.queue_seconds = seconds(
            "fusion_queue_seconds", "Until a request goes to the engine: checks, and what is made and loaded for it"
        )
        text, labels = "Requests whose fusion was there, by how it is served and came", ("profile", "mode", "source")
        self.served = Counter("fusion_served", text, labels, registry=registry)
        text = "Unloaded from the engine: for others (room), or not needed (gone)"
        self.evictions = Counter("fusion_evictions", text, ["kind", "reason"], registry=registry)
        self.mixes = Mixes()
        self.uses = Uses()
        text = "Vectors of weights that run on a stack"
        ReadGauge("fusion_stack_mixes", text, "stack", registry=registry).source = self.mixes.list_running
        text = "Vectors of weights within a minute"
        ReadGauge("fusion_distinct_mixes", text, registry=registry).source = self.mixes.count_seen

    def _add_policy(self, registry: CollectorRegistry) -> None:
        text = "Requests and profiles that a rule refused"
        self.rules = Counter("fusion_policy_refusals", text, ["rule"], registry=registry)
        self.limits = Counter("fusion_limit_refusals", "Requests over a limit", ["subject", "kind"], registry=registry)
        self._demanded: dict[str, float] = {}
        self._floors = Gauge("fusion_floor", "Weight that the policy demands", ["adapter"], registry=registry)
        text = "Answers with less of an adapter than the policy demands, for callers that no rule is about"
        self._misses = Counter("fusion_floor_misses", text, ["adapter"], registry=registry)
        text = "Least weight that acted, of an adapter with a floor"
        self._floor_weights = LabeledHistogram("fusion_floor_weight", text, "adapter", WEIGHTS, registry=registry)
        text = "Used of the limits, by those who use most of theirs"
        self.used = ReadGauge("fusion_limit_used_ratio", text, "subject", "kind", registry=registry)
        text = "Of the scorecards that a profile rests on"
        self.evidence = ReadGauge("fusion_evidence_age_seconds", text, "profile", registry=registry)

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

    def record_refusal(self, reason: Literal["queue", "timeout", "client", "limit", "engine"]) -> None:
        """Count a request that was refused because there is no room for it now."""
        self.refusals.labels(reason).inc()

    def record_lookup(self, source: str) -> None:
        """Count a request by where its fusion came from: warm, loaded or built."""
        self.lookups.labels(source).inc()

    def record_rule(self, rule: str) -> None:
        """Count what a rule of the policy has refused."""
        self.rules.labels(rule).inc()

    def set_floor(self, adapter: str, at_least: float) -> None:
        """State which weight the policy demands."""
        self._demanded[adapter] = at_least
        self._floors.labels(adapter).set(at_least)
        self._misses.labels(adapter)

    def record_floor(self, adapter: str, weight: float, *, is_allowed: bool = False) -> None:
        """Count the least weight that an adapter with a floor has in an answer; `is_allowed` by another rule."""
        self._floor_weights.observe(adapter, weight)
        if not is_allowed and weight < self._demanded.get(adapter, weight) - TOLERANCE:
            self._misses.labels(adapter).inc()

    def begin_lease(self, kind: str, key: str, vector: str, tenant: str = "") -> Callable[[], None]:
        """Count a tenant's request that runs on a stack, with this vector of weights, or on a build; returns what ends
        it.
        """
        end_use = self.uses.begin(tenant, key, vector)
        gauge = self.leases.labels(kind)
        gauge.inc()
        if kind == "stack":
            self.mixes.begin(key, vector)

        def end() -> None:
            end_use()
            gauge.dec()
            if kind == "stack":
                self.mixes.end(key, vector)

        return end

    def forget(self, profile: str) -> None:
        """Drop the series of a deleted profile, which keeps their number bounded."""
        for metric in (self.requests, self.tokens, self.served):
            metric.remove_by_labels({"profile": profile})
        for histogram in (self.first_token, self.gaps, self.request_seconds, self.queue_seconds):
            histogram.remove(profile)
