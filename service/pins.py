"""Pinned profiles: what serves them is loaded at the start and stays in the engine while there is other room.

Pins are kept in the registry, of which every replica has what it says. Only the operator pins: places of the engine are
everybody's.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from service.callers import Caller
from service.conditions import UNCONDITIONAL, Condition
from service.errors import ApiError
from service.placement import Home
from service.policy import Policy
from service.pool import Pool
from service.records import ProfileVersion
from service.registry import Registry
from service.resolve import Fusion, Names
from service.waits import enter, finish

OPERATOR = Caller()


@dataclass(frozen=True, slots=True)
class Pins:
    """Pins and unpins profiles; all but one of the engine's `places` can be kept for them."""

    registry: Registry
    names: Names
    pool: Pool
    policy: Policy
    write_lock: asyncio.Lock
    """Held by everything that changes the registry."""
    places: int
    timeout_s: float
    """How long a change waits for others."""
    _fusions: dict[str, tuple[ProfileVersion, Fusion]] = field(default_factory=dict)
    """What pinned profiles mean, by registered name: versions never change."""

    def list_fusions(self) -> dict[str, Fusion]:
        """What the pinned profiles mean that can be served, by registered name; from any thread."""
        pinned = dict(self.registry.snapshot.pinned)
        for key in [key for key in list(self._fusions) if key not in pinned]:
            self._fusions.pop(key, None)
        return {key: fusion for key in pinned if (fusion := self._find_fusion(key)) is not None}

    def _find_fusion(self, key: str) -> Fusion | None:
        version = self.registry.profiles.get(key)
        if version is None:
            return None
        known, fusion = self._fusions.get(key, (None, None))
        if fusion is None or known is not version:
            try:
                fusion = self.names.view(version.tenant).resolve_profile(version)
            except ApiError:  # its adapters are gone, which its status says
                return None
            self._fusions[key] = version, fusion
        return fusion

    def list_keys(self) -> set[str]:
        """The keys of the residents that stay: of each pinned profile the one that serves it. One place stays for all
        else, whatever was pinned when there were more.
        """
        found = (self.pool.find_resident(home) for home in self._list_homes())
        return {resident.key for resident in found if resident is not None}

    def _list_homes(self) -> Iterator[Home]:
        for fusion in islice(self.list_fusions().values(), self.places - 1):
            try:
                yield self.pool.find_home(fusion)
            except ApiError:  # weights by position, where this engine does not mix
                continue

    async def pin(
        self, name: str, *, tenant: str = "", caller: Caller = OPERATOR, condition: Condition = UNCONDITIONAL
    ) -> ProfileVersion:
        """Load what serves a profile and keep it; 409 when nothing else would have a place any more."""
        version = self._check(name, tenant, condition)
        fusion = self.names.resolve_profile(version)
        await self.policy.check(fusion, caller, profile=name)
        self._check_room(version.key)
        async with self.pool.lease(fusion):
            await finish(self._write(name, tenant, condition, pinned=True))
        return version

    async def unpin(self, name: str, *, tenant: str = "", condition: Condition = UNCONDITIONAL) -> None:
        """Let what serves a profile go when its place is needed."""
        self._check(name, tenant, condition)
        await finish(self._write(name, tenant, condition, pinned=False))

    def _check(self, name: str, tenant: str, condition: Condition) -> ProfileVersion:
        if tenant:
            message = "The engine's places are everybody's: only the operator's keys pin profiles; ask an admin."
            raise ApiError(403, message)
        version = self.names.profile(name, param="profile")
        if "@" in name:
            raise ApiError(
                400, f"{name!r} is a version: pin the profile, whose current version stays.", param="profile"
            )
        condition.check(self.registry.tag_profile(version.key))
        return version

    async def _write(self, name: str, tenant: str, condition: Condition, *, pinned: bool) -> None:
        async with enter(self.write_lock, self.timeout_s, "other changes of the registry"), self.registry.change():
            key = self._check(name, tenant, condition).key
            if pinned == (key in self.registry.snapshot.pinned):
                return
            if pinned:
                self._check_room(key)
            await self.registry.set_pinned(key, pinned=pinned)

    def _check_room(self, key: str) -> None:
        others = self.registry.snapshot.pinned.keys() - {key}
        if len(others) >= self.places - 1:
            message = (
                f"{len(others)} profiles are pinned, and of {self.places} places of the engine (FUSION_MAX_CPU_LORAS)"
            )
            raise ApiError(409, f"{message} one stays for all else; unpin one first.", param="profile")
