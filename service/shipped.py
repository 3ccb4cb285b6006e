"""What the settings name and a server has from its start: adapters, profiles, and the first profiles' stacks."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from adapters import FusionError, RecipeError, parse
from adapters.files import adapter_path
from service.catalog import MISMATCH
from service.errors import ApiError, api_error
from service.fusion_service import FusionService
from service.pins import OPERATOR
from service.sources.fetches import Fetch, Order
from service.sources.locations import is_remote

TAKEN = 409
"""The status where a name is being fetched, or its form is taken, or there are too many."""
log = logging.getLogger("fusion")


async def register_shipped(service: FusionService) -> None:
    """Register the adapters and profiles that the settings name, where their names are free and there is room: what
    clients have registered, or are fetching, ends no start.
    """
    pairs = [pair.partition("=") for pair in service.settings.adapters]
    free = [
        (name, source) for name, _, source in pairs if service.names.owner(name) is None or _is_damaged(service, name)
    ]
    fetches: dict[str, Fetch] = {}
    for name, source in free:
        with _naming(f"{name}={source}"):
            if is_remote(source):  # all at once
                fetches[name] = service.fetches.start(Order(name, source))
    for name, source in free:
        fetch = fetches.get(name)
        if is_remote(source) and fetch is None:
            continue
        with _naming(f"{name}={source}"):
            record, _ = await (fetch.wait() if fetch else service.catalog.add(name, adapter_path(source)))
            if (mismatch := record.info.get(MISMATCH)) is not None:
                log.warning("adapter %r names the base %r; it is served since every shape fits", name, mismatch)
    for pair in service.settings.profiles:
        name, _, recipe = pair.partition("=")
        if service.names.owner(name) is not None:
            continue
        try:
            parse(recipe, max_weight=service.settings.max_weight)
            await service.profiles.put(name, recipe, only_new=True)  # another replica may start, too
        except Exception as error:
            if isinstance(error, RecipeError) or api_error(error).status >= 500:
                raise RuntimeError(f"FUSION_PROFILES names {pair!r}: {error}") from error
            log.warning("profile %r waits for its adapters, for the policy, or for room: %s", name, error)


@contextmanager
def _naming(pair: str) -> Iterator[None]:
    """Say in an error which pair of FUSION_ADAPTERS it is about; log that its name or its room is taken."""
    try:
        yield
    except (FusionError, ApiError, OSError) as error:
        if api_error(error).status == TAKEN:
            log.warning("FUSION_ADAPTERS: %r is not registered: %s", pair, error)
            return
        raise RuntimeError(f"FUSION_ADAPTERS names {pair!r}: {error}") from error


def _is_damaged(service: FusionService, name: str) -> bool:
    return name in service.registry.snapshot.damaged_adapters


async def warm(service: FusionService) -> None:
    """Load what serves the pinned profiles and the first ones, so that their first requests find it: as many as there
    are places for, of those that the policy lets answer.
    """
    profiles, room = service.registry.profiles, service.pins.places - 1
    pinned = [key for key in service.registry.snapshot.pinned if key in profiles]
    if over := pinned[room:]:
        places = f"of {room + 1} places (FUSION_MAX_CPU_LORAS) one stays for all else"
        log.warning("%d profiles are pinned, and %s: %s are not kept; unpin some", len(pinned), places, ", ".join(over))
    for key in dict.fromkeys([*pinned[:room], *list(profiles)[: service.settings.max_loras]]):
        profile = profiles[key]
        try:
            fusion = service.names.view(profile.tenant).resolve_profile(profile)
            await service.policy.check(fusion, OPERATOR, profile=profile.name)
            async with service.pool.lease(fusion):
                pass
        except Exception as error:
            log.warning("profile %r cannot be served now: %s", profile.name, error)
