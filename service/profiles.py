"""Profiles: named, versioned recipes with their parents pinned."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from adapters import RecipeError, check_name
from service.adapter_files import AdapterFiles
from service.callers import Caller
from service.conditions import UNCONDITIONAL, Condition
from service.errors import ApiError, public_entry
from service.metrics import Metrics
from service.policy import Policy
from service.pool import Pool
from service.records import ProfileVersion, now
from service.registry import Registry, to_json
from service.resolve import Fusion, Names
from service.settings import Settings
from service.tenants import join_key
from service.validation import MAX_QUOTED
from service.waits import enter, finish

MAX_VERSIONS = 1000
MAX_VERSION_BYTES = 256 * 1024
"""Of one version as JSON: recipe, defaults, description."""


OPERATOR = Caller()
PROFILE_ROUTES = ("export", "pin", "rollback", "status")
"""What follows a profile's name in paths."""


def check_profile_name(name: str) -> str:
    """Return `name` if a profile may be called that; RecipeError otherwise."""
    check_name(name)
    if "@" in name:
        raise RecipeError(f"{name!r} is not a name for a profile: expected none with '@', which names its versions")
    if name.rpartition("/")[2] in PROFILE_ROUTES and "/" in name:
        ends = " or ".join(f"'/{route}'" for route in PROFILE_ROUTES)
        raise RecipeError(f"the name {name!r} is reserved: expected none that ends with {ends}")
    return name


@dataclass(frozen=True, slots=True)
class Profiles:
    """Creates, rolls back and removes profiles, one change at a time."""

    settings: Settings
    registry: Registry
    names: Names
    pool: Pool
    metrics: Metrics
    files: AdapterFiles
    policy: Policy
    write_lock: asyncio.Lock
    """Held by everything that changes the registry, for the change alone."""

    async def put(
        self,
        name: str,
        fusion: Any,
        *,
        tenant: str = "",
        defaults: Mapping[str, Any] | None = None,
        description: str = "",
        client: str | None = None,
        caller: Caller = OPERATOR,
        only_new: bool = False,
        condition: Condition = UNCONDITIONAL,
    ) -> tuple[ProfileVersion, bool]:
        """Make a new version of the `tenant`'s profile, or of a public one, the current one; returns it and whether the
        profile is new. With `only_new` one that is there by then stays as it is.

        `fusion` is the request key of that name: a recipe over adapters, as text or JSON form; `defaults` are checked.
        It is made first, in a place of `client`, and what was checked before is checked again when it is written.
        412 when the `condition` does not hold of the profile.
        """
        parts = {"defaults": dict(defaults or {}), "description": description}
        resolved = await self.check(
            name, fusion, parts, tenant=tenant, client=client, caller=caller, condition=condition
        )
        async with self.files.hold(resolved.parents.values()), self.pool.lease(resolved, client=client):
            writing = self._add_version(tenant, name, fusion, resolved, parts, condition, only_new=only_new)
            return await finish(writing)

    async def check(
        self,
        name: str,
        fusion: Any,
        parts: Mapping[str, Any],
        *,
        tenant: str = "",
        client: str | None = None,
        caller: Caller = OPERATOR,
        condition: Condition = UNCONDITIONAL,
    ) -> Fusion:
        """What `fusion` means now, if a profile of this name may have it and the policy lets `caller` write it.

        `parts` are its defaults and description.
        """
        check_profile_name(name)
        self._check_name(tenant, name)
        condition.check(self.registry.tag_profile(join_key(tenant, name)))
        resolved = self._resolve(tenant, fusion)
        await self.policy.check(resolved, caller, profile=name)
        self._check_room(self._make_version(tenant, name, resolved, parts))
        self.pool.check_room(resolved, client)
        return resolved

    def _make_version(self, tenant: str, name: str, fusion: Fusion, parts: Mapping[str, Any]) -> ProfileVersion:
        number = max(self.registry.version_numbers(join_key(tenant, name)), default=0) + 1
        recipe, parents = fusion.recipe.format(), dict(fusion.parents)
        return ProfileVersion(name, number, recipe, parents, fusion.digest, **parts, created=now(), tenant=tenant)

    async def _add_version(
        self,
        tenant: str,
        name: str,
        fusion: Any,
        resolved: Fusion,
        parts: Mapping[str, Any],
        condition: Condition,
        *,
        only_new: bool,
    ) -> tuple[ProfileVersion, bool]:
        """Write a new version, unless `fusion` no longer means `resolved`."""
        async with self._write():
            key = join_key(tenant, name)
            if only_new and key in self.registry.profiles:
                return self.registry.profiles[key], False
            self._check_name(tenant, name)
            condition.check(self.registry.tag_profile(key))
            if self._resolve(tenant, fusion).digest != resolved.digest:
                message = "An adapter of this recipe was replaced meanwhile; send the request again."
                raise ApiError(409, message, param="fusion")
            profile = self._make_version(tenant, name, resolved, parts)
            self._check_room(profile)
            await self.registry.add_version(profile)
            return profile, profile.version == 1

    async def rollback(
        self,
        name: str,
        version: int,
        *,
        tenant: str = "",
        caller: Caller = OPERATOR,
        condition: Condition = UNCONDITIONAL,
    ) -> ProfileVersion:
        """Make an earlier version the current one, if the policy lets it answer."""
        names = self.names.view(tenant)
        earlier = names.resolve_profile(names.profile(f"{name}@{version}", param="version"))
        await self.policy.check(earlier, caller, profile=name)
        return await finish(self._roll_back(tenant, name, version, condition))

    async def _roll_back(self, tenant: str, name: str, version: int, condition: Condition) -> ProfileVersion:
        async with self._write():
            key = join_key(tenant, name)
            self._check_owner(tenant, name)
            self.names.view(tenant).profile(f"{name}@{version}", param="version")
            condition.check(self.registry.tag_profile(key))
            current = self.registry.profiles.get(key)
            if current is not None and current.version == version:  # nothing changes, and so says the audit
                return current
            return await self.registry.set_current(key, version)

    async def remove(self, name: str, *, tenant: str = "", condition: Condition = UNCONDITIONAL) -> None:
        """Delete a profile and its versions; 403 for a public one of which `tenant` is not the owner."""
        await finish(self._remove(tenant, name, condition))

    async def _remove(self, tenant: str, name: str, condition: Condition) -> None:
        async with self._write():
            key = join_key(tenant, name)
            if key not in self.registry.snapshot.damaged_profiles:
                check_profile_name(name)  # a version is not removed by itself
                self._check_owner(tenant, name)
                self.names.view(tenant).profile(name, param="name")
            condition.check(self.registry.tag_profile(key))
            versions = self.registry.versions.get(key, {}).values()
            digests = {digest for version in versions for digest in version.parents.values()}
            await self.registry.remove_profile(key)
            self.metrics.forget(key)
        for digest in digests:  # of adapters that were kept for this profile alone
            if not self.registry.is_needed(digest):
                self.pool.forget(digest)
        await self.files.delete_unneeded(digests)

    @asynccontextmanager
    async def _write(self) -> AsyncIterator[None]:
        """Alone, and with the registry knowing what its database holds."""
        wait_s = self.settings.wait_timeout_s
        async with enter(self.write_lock, wait_s, "other changes of the registry"), self.registry.change():
            yield

    def _check_room(self, profile: ProfileVersion) -> None:
        """Raise 413 when the version is too large, 409 when the registry is full."""
        size = len(to_json(profile.body()))
        if size > MAX_VERSION_BYTES:
            message = f"A version of a profile may have at most {MAX_VERSION_BYTES} bytes as JSON, this one has {size}."
            raise ApiError(413, message)
        self.registry.check_room(size, self.settings.registry_bytes)

    def _resolve(self, tenant: str, fusion: Any) -> Fusion:
        resolved = self.names.view(tenant).resolve_field(fusion)
        if resolved is None or resolved.profile is not None:
            message = f"A profile's 'fusion' must be a recipe over adapters, got {fusion!r:.{MAX_QUOTED}}."
            raise ApiError(400, message, param="fusion")
        return resolved

    def _check_owner(self, tenant: str, name: str) -> None:
        """Raise 403 for a public profile of which `tenant` is not the owner."""
        names = self.names.view(tenant)
        if names.seen.is_public(name) and (name in names.seen.profiles or name in names.seen.damaged_profiles):
            raise public_entry(name, str(names.owner(name)))

    def _check_name(self, tenant: str, name: str) -> None:
        """Raise 409 unless a profile may have this name, and one more version; 403 as `_check_owner`."""
        key, snapshot, names = join_key(tenant, name), self.registry.snapshot, self.names.view(tenant)
        if len(self.registry.version_numbers(key)) >= MAX_VERSIONS:
            raise ApiError(409, f"{name!r} has {MAX_VERSIONS} versions, the limit; delete the profile first.")
        if key in snapshot.profiles or key in snapshot.damaged_profiles:
            return
        self._check_owner(tenant, name)
        if (owner := names.owner(name)) is not None:
            raise ApiError(409, f"{name!r} is already {owner}; choose another name.", param="name")
        for adapter in (*names.seen.adapters, *names.seen.damaged_adapters):
            if adapter.startswith(f"{name}@"):
                message = f"Versions of {name!r} would have the form of the adapter {adapter!r}; choose another name."
                raise ApiError(409, message, param="name")
        if len(self.registry.profiles) >= self.settings.max_names:
            raise ApiError(409, f"There are already {self.settings.max_names} profiles, the limit; delete one first.")
