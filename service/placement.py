"""Which stack or build serves a fusion: decided once per request, from values alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, Protocol

from service.resolve import Fusion

Kind = Literal["stack", "build"]
Group = Mapping[str, int]
"""Adapters that share one stack: rank by digest."""


class Occupant(Protocol):
    """What the choice depends on of a stack or build in the engine; `widths` has a stack's adapters by digest."""

    key: str
    rank: int
    leases: int
    widths: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Limits:
    """What this server can serve: whether it mixes, and the largest rank of a stack or build."""

    mixing: bool
    max_rank: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a fusion is served: the key of a stack or build, the adapters in it, and why it is built."""

    kind: Kind
    key: str
    digests: tuple[str, ...]
    reason: str | None = None
    """Why the fusion is built; None when it is mixed."""


def stack_key(digests: Iterable[str]) -> str:
    """Store key of the stack of these adapters, in whatever order."""
    return sha256(("stack/1/" + "/".join(sorted(digests))).encode()).hexdigest()


def build_key(fusion: Fusion, max_rank: int) -> str:
    """Store key of `fusion` built at most at `max_rank`."""
    return sha256(f"build/1/{fusion.digest}/{max_rank}".encode()).hexdigest()


def why_built(fusion: Fusion, limits: Limits) -> str | None:
    """Why `fusion` cannot be mixed, or None when it can: a plain sum of LoRA on dense layers that fits one stack."""
    if not limits.mixing:
        return "mixing is off on this server"
    if not fusion.recipe.is_sum:
        what = "a schedule over layers" if fusion.recipe.method == "sum" else repr(fusion.recipe.method)
        return f"{what} is not a plain sum"
    if fusion.built:
        return f"LoRA on {fusion.built} cannot be mixed"
    if fusion.rank > limits.max_rank:
        return f"the adapters' ranks add up to {fusion.rank}, over FUSION_MAX_LORA_RANK={limits.max_rank}"
    return None


def place(fusion: Fusion, residents: Iterable[Occupant], groups: Iterable[Group], limits: Limits) -> Placement:
    """The stack that serves `fusion`, resident or not, or else the build.

    The stack is that of the first declared group that holds the adapters and fits; else, of the resident ones that
    hold them, the one with the most running requests, since the engine batches few stacks at once and one runs
    fastest; of idle ones the smallest; else a stack of just these adapters.
    """
    members = set(fusion.ranks)
    if (reason := why_built(fusion, limits)) is not None:
        return Placement("build", build_key(fusion, limits.max_rank), tuple(sorted(members)), reason)
    for group in groups:
        if members <= group.keys() and sum(group.values()) <= limits.max_rank:
            digests = tuple(sorted(group))
            return Placement("stack", stack_key(digests), digests)
    if holding := [resident for resident in residents if members <= resident.widths.keys()]:
        best = min(holding, key=lambda resident: (-resident.leases, resident.rank, resident.key))
        return Placement("stack", best.key, tuple(best.widths))
    digests = tuple(sorted(members))
    return Placement("stack", stack_key(digests), digests)
