"""`/v1/models`: the base first, then adapters and profiles, each with its `fusion` object."""

from datetime import datetime
from typing import TYPE_CHECKING

from adapters import parse
from service.resolve import Fusion
from service.routes import Service, make_router
from service.routes.schemas import FusionState, Listing, Model

if TYPE_CHECKING:
    from service.fusion_service import FusionService

router = make_router("Models", "/v1/models")


def fusion_state(service: "FusionService", fusion: Fusion) -> FusionState:
    """What is known about `fusion` now."""
    state, reason = service.pool.state(fusion)
    card = FusionState(
        recipe=fusion.recipe.format(),
        digest=fusion.digest,
        rank=fusion.rank,
        state=state,
        scorecards=service.registry.scorecard_counts.get(fusion.digest, 0),
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
        fusion=None if fusion is None else fusion_state(service, fusion),
    )
    if fusion is None:
        card.max_model_len = service.engine.config.model_config.max_model_len
    return card


@router.get("", response_model_exclude_unset=True)
async def list_models(service: Service) -> Listing[Model]:
    """List everything a request may name."""
    names, registry = service.names, service.registry
    adapters = [(n, r.created, names.resolve_recipe(parse(n))) for n, r in sorted(registry.adapters.items())]
    profiles = [(n, p.created, names.resolve_profile(p)) for n, p in sorted(registry.profiles.items())]
    entries = [(names.base, "", None), *adapters, *profiles]
    return Listing[Model](object="list", data=[model_card(service, *entry) for entry in entries])


@router.get("/{name:path}", response_model_exclude_unset=True)
async def show_model(name: str, service: Service) -> Model:
    """Show what a name or a recipe stands for."""
    fusion = service.names.look_up(name)
    created = "" if fusion is None or fusion.profile is None else fusion.profile.created
    return model_card(service, name, created, fusion)
