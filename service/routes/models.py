"""`/v1/models`: the base first, then adapters and profiles, each with its `fusion` object."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from fastapi import Response
from fastapi.responses import StreamingResponse

from service.errors import ApiError
from service.forms import alias
from service.records import ProfileVersion
from service.resolve import Fusion
from service.routes import Service, make_router
from service.routes.schemas import DamagedState, FusionState, Listing, Model

if TYPE_CHECKING:
    from service.fusion_service import FusionService

PART_BYTES = 64 * 2**10
"""A list is made and sent in parts of about this: it is never in memory as a whole, and other requests go on."""

router = make_router("Models", "/v1/models")


def fusion_state(service: "FusionService", fusion: Fusion) -> FusionState:
    """What is known about `fusion` now."""
    state, reason = service.pool.state(fusion)
    damage = service.materializer.damage
    if state != "warm" and (damaged := next((digest for digest in fusion.ranks if digest in damage), None)):
        state, reason = "damaged", f"the stored files of an adapter: {damage[damaged]}"
    card = FusionState(
        recipe=fusion.recipe.format(),
        digest=fusion.digest,
        rank=fusion.rank,
        state=state,
        scorecards=service.registry.snapshot.scorecard_counts.get(fusion.digest, 0),
        stack=service.pool.home_key(fusion),
    )
    if reason is not None:
        card.reason = reason
    if fusion.profile is not None:
        card.version = fusion.profile.version
    return card


def model_card(service: "FusionService", name: str, created: str, fusion: Fusion | None) -> Model:
    """The model object of `name`, registered at `created` (ISO 8601 or empty); `fusion` is None for the base."""
    card = Model(
        id=name,
        object="model",
        created=int(datetime.fromisoformat(created).timestamp()) if created else 0,
        owned_by="lora-fusion",
        parent=None if fusion is None else service.names.base,
        root=name,
        fusion=None if fusion is None else fusion_state(service, fusion),
    )
    if fusion is None:
        card.max_model_len = service.engine.config.model_config.max_model_len
    return card


def damaged_card(service: "FusionService", name: str, reason: str) -> Model:
    """The model object of a name whose record, or that of its adapters, cannot be read."""
    state = DamagedState(state="damaged", reason=reason)
    return Model(
        id=name, object="model", created=0, owned_by="lora-fusion", parent=service.names.base, root=name, fusion=state
    )


def model_cards(service: "FusionService") -> Iterator[Model]:
    """Everything a request may name, when the first one is asked for and still when its turn comes."""
    names, snapshot = service.names, service.registry.snapshot
    adapters = sorted({*snapshot.adapters, *snapshot.damaged_adapters})
    profiles = sorted({*snapshot.profiles, *snapshot.damaged_profiles})
    yield model_card(service, names.base, "", None)
    for name in adapters:
        if name in snapshot.damaged_adapters:
            yield damaged_card(service, name, snapshot.damaged_adapters[name])
        elif (record := snapshot.adapters.get(name)) is not None and not record.gate:
            yield from _list_forms(
                service, model_card(service, name, record.created, names.bind(record.recipe, [record]))
            )
    for name in profiles:
        if name in snapshot.damaged_profiles:
            yield damaged_card(service, name, snapshot.damaged_profiles[name])
        elif (profile := snapshot.profiles.get(name)) is not None:
            yield from _list_forms(service, _profile_card(service, name, profile))
            if "versions" in service.settings.model_forms:
                for number, version in sorted(snapshot.versions[name].items()):
                    card = _profile_card(service, f"{name}@{number}", version)
                    card.root = name
                    yield card


def _profile_card(service: "FusionService", name: str, version: ProfileVersion) -> Model:
    try:
        return model_card(service, name, version.created, service.names.resolve_profile(version))
    except ApiError as error:  # an adapter of it has no record
        return damaged_card(service, name, error.message)


def _list_forms(service: "FusionService", card: Model) -> Iterator[Model]:
    """The model, and once more under its alias where that is listed."""
    yield card
    if "aliases" in service.settings.model_forms:
        yield card.model_copy(update={"id": alias(service.names.base, card.id)})


async def _write_list(cards: Iterator[Model]) -> AsyncIterator[str]:
    part, comma = '{"object":"list","data":[', ""
    for card in cards:
        part += comma + card.model_dump_json(exclude_unset=True)
        comma = ","
        if len(part) > PART_BYTES:
            yield part
            await asyncio.sleep(0)
            part = ""
    yield part + "]}"


@router.get("", response_class=Response, responses={200: {"model": Listing[Model]}})
async def list_models(service: Service) -> Response:
    """List everything a request may name."""
    return StreamingResponse(_write_list(model_cards(service)), media_type="application/json")


@router.get("/{name:path}", response_model_exclude_unset=True)
async def show_model(name: str, service: Service) -> Model:
    """Show what a name or a recipe stands for."""
    snapshot = service.registry.snapshot
    for damaged in (snapshot.damaged_profiles, snapshot.damaged_adapters):
        if name in damaged:
            return damaged_card(service, name, damaged[name])
    fusion = service.names.look_up(name)
    created = "" if fusion is None or fusion.profile is None else fusion.profile.created
    return model_card(service, name, created, fusion)
