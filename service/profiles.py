"""Profiles: named, versioned recipes with their parents pinned."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters import check_name
from service.errors import ApiError
from service.metrics import Metrics
from service.pool import Pool
from service.registry import ProfileVersion, Registry, now
from service.resolve import Names
from service.settings import Settings
from service.validation import MAX_QUOTED

MAX_VERSIONS = 1000


@dataclass(frozen=True, slots=True)
class Profiles:
    """Creates, rolls back and removes profiles, one change at a time."""

    settings: Settings
    registry: Registry
    names: Names
    pool: Pool
    metrics: Metrics
    writing: asyncio.Lock
    """Held by everything that changes the registry."""

    async def put(
        self, name: str, fusion: Any, *, defaults: Mapping[str, Any] | None = None, description: str = ""
    ) -> tuple[ProfileVersion, bool]:
        """Make a new version of a profile the current one; returns it and whether the profile is new.

        `fusion` is the request key of that name: a recipe over adapters, as text or JSON form; `defaults` are checked.
        """
        check_name(name)
        async with self.writing:
            self._check_name(name)
            resolved = self.names.resolve_field(fusion)
            if resolved is None or resolved.profile is not None:
                message = f"A profile's 'fusion' must be a recipe over adapters, got {fusion!r:.{MAX_QUOTED}}."
                raise ApiError(400, message, param="fusion")
            versions = self.registry.versions.get(name, {})
            if len(versions) >= MAX_VERSIONS:
                raise ApiError(409, f"{name!r} has {MAX_VERSIONS} versions, the limit; delete the profile first.")
            profile = ProfileVersion(
                name,
                max(versions, default=0) + 1,
                resolved.recipe.format(),
                dict(resolved.parents),
                resolved.digest,
                dict(defaults or {}),
                description,
                now(),
            )
            async with self.pool.lease(resolved):
                await asyncio.to_thread(self.registry.add_version, profile)
            return profile, profile.version == 1

    async def rollback(self, name: str, version: int) -> ProfileVersion:
        """Make an earlier version the current one."""
        async with self.writing:
            self.names.profile(f"{name}@{version}", param="version")
            return await asyncio.to_thread(self.registry.set_current, name, version)

    async def remove(self, name: str) -> None:
        """Delete a profile and its versions."""
        check_name(name)
        async with self.writing:
            self.names.profile(name, param="name")
            await asyncio.to_thread(self.registry.remove_profile, name)
            self.metrics.forget(name)

    def _check_name(self, name: str) -> None:
        """Raise 409 unless a profile has this name or may get it."""
        if name in self.registry.profiles:
            return
        if (owner := self.names.owner(name)) is not None:
            raise ApiError(409, f"{name!r} is already {owner}; choose another name.", param="name")
        if len(self.registry.profiles) >= self.settings.max_names:
            raise ApiError(409, f"There are already {self.settings.max_names} profiles, the limit; delete one first.")
