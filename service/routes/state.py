"""`/v1/state`: what the engine holds, who waits, and what of the limits is used, as far as the caller may see it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Literal

from fastapi import Request
from pydantic import BaseModel, Field

from service.callers import find_caller
from service.ledger import Kind as LimitKind, Ledger
from service.occupancy import Occupancy, Occupant
from service.routes import Service, Tenant, make_router
from service.snapshot import Snapshot
from service.tenants import is_operator, split_key

MAX_METERS = 500
"""Limits in one answer: those used most."""

router = make_router("State", "/v1/state")


class Member(BaseModel):
    """An adapter of a stack or build."""

    digest: str = Field(description="of its content")
    names: list[str] = Field(description="that stand for this content; an admin of the operator sees `tenant|name`")


class Resident(BaseModel):
    """A stack or build in a place of the engine, or on its way to one."""

    key: str
    kind: Literal["stack", "build"]
    state: str = Field(json_schema_extra={"enum": ["warm", "draining", "queued", "fusing", "in line", "loading"]})
    adapters: list[Member]
    requests: int = Field(description="that use it, or wait for it")
    seconds: float = Field(description="since it was last used; of one on its way, since it was first asked for")
    evictable: bool = Field(description="whether it makes way when a place is needed: nobody uses it")
    pinned: bool = Field(description="whether it stays while there is other room")
    in_batch: bool = Field(description="whether it is among those that one batch can hold")
    rank: int = Field(description="0 of one on its way")
    error: float = Field(description="relative Frobenius error of a build")


class Queue(BaseModel):
    """Requests that wait for stacks and builds."""

    waiting: int
    oldest_s: float = Field(description="seconds since the first of what they wait for was asked for; 0 without any")


class UsedLimit(BaseModel):
    """A limit of which something is used."""

    subject: Literal["key", "tenant"]
    name: str = Field(description="a key's id, or a tenant's name; empty: the operator's")
    kind: LimitKind
    limit: float
    used: int = Field(description="in the last minute, with what is reserved for running requests; by this server")


class PolicyName(BaseModel):
    """The policy in force."""

    id: str
    name: str


class State(BaseModel):
    """What the engine holds, and what of the limits is used."""

    object: Literal["state"]
    slots: int = Field(description="stacks and builds that one batch can hold")
    places: int = Field(description="stacks and builds that the engine can hold")
    free: int | None = Field(description="places without any; null unless an admin of the operator asks")
    residents: list[Resident]
    queue: Queue
    limits: list[UsedLimit]
    policy: PolicyName


@router.get("")
async def show_state(request: Request, service: Service, tenant: Tenant) -> State:
    """Show the stacks and builds in the engine, the requests that wait for some, and what of the limits is used."""
    sees_all = not tenant and is_operator(find_caller(request.scope))
    snapshot, occupancy = service.registry.snapshot, service.pool.survey()
    residents = list(_describe(occupancy, snapshot, tenant, sees_all=sees_all))
    waiting = [one for one in residents if one.state not in ("warm", "draining")]
    return State(
        object="state",
        slots=occupancy.slots,
        places=service.settings.max_cpu_loras,
        free=occupancy.free if sees_all else None,
        residents=residents,
        queue=Queue(
            waiting=sum(one.requests for one in waiting), oldest_s=max((one.seconds for one in waiting), default=0.0)
        ),
        limits=_list_limits(service.registry.ledger, snapshot, tenant, sees_all=sees_all),
        policy=PolicyName(id=service.policy.id, name=service.policy.rules.name),
    )


def _describe(occupancy: Occupancy, snapshot: Snapshot, tenant: str, *, sees_all: bool) -> Iterator[Resident]:
    wanted = {digest for one in occupancy.occupants for digest in one.digests}
    names: dict[str, list[str]] = defaultdict(list)
    for record in (*snapshot.adapters.values(), *snapshot.nameless.values()):
        if record.digest in wanted:
            names[record.digest].append(record.key)
    for one in occupancy.occupants:
        if sees_all or _sees(one, names, tenant):
            yield _make_card(one, names, tenant, sees_all=sees_all)


def _sees(one: Occupant, names: dict[str, list[str]], tenant: str) -> bool:
    """Whether all adapters are the tenant's or public, and one is the tenant's alone: only its requests use that."""
    owners = [{split_key(key)[0] for key in names[digest]} for digest in one.digests]
    own = not tenant or any(found == {tenant} for found in owners)
    return bool(owners) and own and all(found & {"", tenant} for found in owners)


def _make_card(one: Occupant, names: dict[str, list[str]], tenant: str, *, sees_all: bool) -> Resident:
    def show(keys: Iterable[str]) -> list[str]:
        return sorted(keys) if sees_all else sorted({split_key(k)[1] for k in keys if split_key(k)[0] in ("", tenant)})

    return Resident(
        key=one.key,
        kind=one.kind,
        state=one.state,
        adapters=[Member(digest=digest, names=show(names[digest])) for digest in one.digests],
        requests=one.requests,
        seconds=round(one.seconds, 1),
        evictable=one.state == "warm" and not one.requests and not one.pinned,
        pinned=one.pinned,
        in_batch=one.in_batch,
        rank=one.rank,
        error=one.error,
    )


def _list_limits(ledger: Ledger, snapshot: Snapshot, tenant: str, *, sees_all: bool) -> list[UsedLimit]:
    """What counts now, most used first; of a tenant its own and its keys'."""
    ledger.forget_idle()
    found = []
    for (subject, kind), meter in ledger.meters.items():
        word, _, name = subject.partition(" ")
        what: Literal["key", "tenant"] = "key" if word == "key" else "tenant"
        key = snapshot.keys.get(name) if what == "key" else None
        owner = name if what == "tenant" else None if key is None else key.tenant
        if meter.used and meter.limit < float("inf") and (sees_all or owner == tenant):
            found.append(UsedLimit(subject=what, name=name, kind=kind, limit=meter.limit, used=meter.used))
    return sorted(found, key=lambda one: -one.used / one.limit)[:MAX_METERS]
