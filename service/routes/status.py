"""How a profile is doing on this server, as its tenant sees it."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from prometheus_client import Histogram

from service.errors import ApiError
from service.metrics import Metrics
from service.placement import Kind
from service.records import ProfileVersion
from service.resolve import Names
from service.routes.state_schemas import Evicted, FusionStatus, Residence

if TYPE_CHECKING:
    from service.fusion_service import FusionService

LOADED_STATES = ("loading", "warm")


async def find_status(service: "FusionService", names: Names, version: ProfileVersion) -> FusionStatus:
    """The status of a profile version; of one that is damaged, why."""
    uses = service.metrics.uses
    used = uses.find_last(names.tenant, version.digest)
    status = FusionStatus(
        object="fusion.status",
        name=version.name,
        version=version.version,
        digest=version.digest,
        mode="mixed",
        state="damaged",
        last_error=None,
        residence=None,
        pinned=version.key in service.registry.snapshot.pinned,
        evicted=None,
        eta_s=None,
        last_used=None if used is None else datetime.fromtimestamp(used, UTC).isoformat(timespec="seconds"),
        evidence_age_s=await _find_evidence_age(service, version.digest, names.tenant),
    )
    try:
        fusion = names.resolve_profile(version)
        placement, home = service.pool.place(fusion), service.pool.find_home(fusion)
    except ApiError as error:
        status.last_error = error.message
        return status
    state, status.last_error = service.pool.home_state(home)
    resident = service.pool.find_resident(home)
    if resident is not None:
        requests = uses.count(names.tenant, resident.key) if names.tenant else resident.leases
        status.residence = Residence(key=resident.key, kind=resident.kind, rank=resident.rank, requests=requests)
    elif (eviction := service.pool.find_eviction(home)) is not None:
        wanted_by = None if names.tenant else eviction.wanted_by
        status.evicted = Evicted(at=eviction.at, reason=eviction.reason, wanted_by=wanted_by)
    status.mode = "built" if placement.kind == "build" else "mixed"
    status.eta_s = estimate_wait(service.metrics, placement.kind, state)
    return status.model_copy(update={"state": state})


async def _find_evidence_age(service: "FusionService", digest: str, tenant: str) -> float | None:
    """Seconds since the newest scorecard was made; None without one, or where the database does not say: all else is
    known without it, and asked for when it is away.
    """
    try:
        made = await service.scorecards.find_newest(digest, tenant)
        return None if made is None else (datetime.now(UTC) - datetime.fromisoformat(made)).total_seconds()
    except (ApiError, ValueError, TypeError):  # the last two for a time that is none, or in no zone
        return None


def estimate_wait(metrics: Metrics, kind: Kind, state: str) -> float | None:
    """How long it takes at most until a stack or build in this state is there, as it took on average (seconds)."""
    if state == "warm":
        return 0.0
    load, build = _find_mean(metrics.load_seconds, {}), _find_mean(metrics.build_seconds, {"kind": kind})
    if load is None or state in LOADED_STATES:
        return load
    return None if build is None else round(build + load, 3)


def _find_mean(histogram: Histogram, labels: dict[str, str]) -> float | None:
    values = {s.name.rpartition("_")[2]: s.value for m in histogram.collect() for s in m.samples if s.labels == labels}
    return round(values["sum"] / values["count"], 3) if values.get("count") else None
