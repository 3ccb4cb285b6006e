"""Which stack or build serves a fusion: decided once per request, from values alone."""

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, Protocol

from service.errors import ApiError
from service.functions import is_uniform
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
    """What this server can serve: whether it mixes, and the largest rank of a stack or build; whether weights may be
    functions of the module, and of the position, and why not.
    """

    mixing: bool
    max_rank: int
    tables: bool = True
    phases: bool = True
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a fusion is served: the key of a stack or build, the adapters in it, and why it is built."""

    kind: Kind
    key: str
    digests: tuple[str, ...]
    reason: str | None = None
    """Why the fusion is built; None when it is mixed."""


@dataclass(frozen=True, slots=True)
class Home:
    """What serves a fusion where nothing is resident; `members`: any stack in the engine that holds them does, too."""

    key: str
    members: frozenset[str] | None


def stack_key(digests: Iterable[str]) -> str:
    """Store key of the stack of these adapters, in whatever order."""
    return sha256(("stack/1/" + "/".join(sorted(digests))).encode()).hexdigest()


def build_key(fusion: Fusion, max_rank: int) -> str:
    """Store key of `fusion` built at most at `max_rank`."""
    return sha256(f"build/1/{fusion.digest}/{max_rank}".encode()).hexdigest()


def why_built(fusion: Fusion, limits: Limits) -> str | None:
    """Why `fusion` cannot be mixed, or None when it can: in each module a weighted sum of LoRA on dense layers that
    fits one stack.
    """
    recipe = fusion.recipe.choose({})
    if not limits.mixing:
        return "mixing is off on this server"
    if not recipe.is_linear:
        return f"{recipe.method!r} is not a weighted sum of its adapters in each module"
    if not limits.tables and not is_uniform(recipe):
        return f"weights by module are off on this server: {limits.reason}"
    if not limits.phases and not fusion.recipe.is_constant:
        return f"weights by position are off on this server: {limits.reason}"
    if fusion.built:
        return f"LoRA on {fusion.built} cannot be mixed"
    if fusion.rank > limits.max_rank:
        return f"the adapters' ranks add up to {fusion.rank}, over FUSION_MAX_LORA_RANK={limits.max_rank}"
    return None


def find_group(members: Set[str], groups: Iterable[Group], limits: Limits) -> Group | None:
    """The first declared group that holds these adapters and fits."""
    return next((g for g in groups if members <= g.keys() and sum(g.values()) <= limits.max_rank), None)


def find_home(fusion: Fusion, groups: Collection[Group], limits: Limits) -> Home:
    """Where `fusion` is served when nothing is resident, and what may serve it instead; errors as `place`."""
    placement, members = place(fusion, (), groups, limits), frozenset(fusion.ranks)
    is_fixed = placement.kind == "build" or find_group(members, groups, limits) is not None
    return Home(placement.key, None if is_fixed else members)


def home_key(fusion: Fusion, groups: Iterable[Group], limits: Limits) -> str:
    """Key of the stack or build that serves `fusion` where nothing is resident: the same on every server with the same
    groups and limits, since it is made of contents alone.
    """
    return place(fusion, (), groups, limits).key


def place(fusion: Fusion, residents: Iterable[Occupant], groups: Iterable[Group], limits: Limits) -> Placement:
    """The stack that serves `fusion`, resident or not, or else the build.

    The stack is that of the first declared group that holds the adapters and fits; else, of the resident ones that
    hold them, the one with the most running requests, since the engine batches few stacks at once and one runs
    fastest; of idle ones the smallest; else a stack of just these adapters. `ApiError` 400 for weights that change with
    position and cannot be mixed: no adapter that is built has them.
    """
    members = set(fusion.ranks)
    if (reason := why_built(fusion, limits)) is not None:
        if not fusion.recipe.is_constant:
            message = f"Weights that change with position or prompt cannot be built, and {reason}."
            raise ApiError(400, message, param="model")
        return Placement("build", build_key(fusion, limits.max_rank), tuple(sorted(members)), reason)
    if (group := find_group(members, groups, limits)) is not None:
        digests = tuple(sorted(group))
        return Placement("stack", stack_key(digests), digests)
    if holding := [resident for resident in residents if members <= resident.widths.keys()]:
        best = min(holding, key=lambda resident: (-resident.leases, resident.rank, resident.key))
        return Placement("stack", best.key, tuple(best.widths))
    digests = tuple(sorted(members))
    return Placement("stack", stack_key(digests), digests)
