"""`/v1/evidence`: the scorecards of all fusions, each with the recipe it is about."""

import asyncio
import time
from typing import Annotated, Any

from fastapi import Query
from pydantic import BaseModel, Field

from adapters.recipes import Recipe, RecipeError, from_json, parse
from service.errors import ApiError
from service.resolve import Names
from service.routes import SeenNames, Service, make_router
from service.routes.paging import MAX_LIMIT, Limit
from service.routes.schemas import Created, Digest, Page

BeforeCard = Annotated[int, Query(ge=0, le=2**31 - 1, description="`last_id` of the part before")]
PAUSE_S = 0.01
"""How long recipes are looked up before other requests have a turn; a card may hold one that takes as long."""

router = make_router("Scorecards", "/v1/evidence")


class MeasuredFusion(BaseModel):
    """A scorecard with the recipe it is about."""

    digest: Digest
    scorecard_id: int
    created: Created
    key: str = Field(description="public id of the API key that attached it; empty without one")
    recipe: str | None = Field(description="canonical; null when the card does not say and nothing here has it")
    fusion: dict[str, Any] | None = Field(description="the recipe in JSON form")
    current: bool = Field(description="whether the recipe stands for this fusion now: its adapters are the same")
    scorecard: dict[str, Any]


@router.get("")
async def list_evidence(
    service: Service, names: SeenNames, limit: Limit = MAX_LIMIT, after: BeforeCard = 0
) -> Page[MeasuredFusion]:
    """List results of all fusions, newest first, with their recipes."""
    cards, has_more = await service.scorecards.read_newest(limit=limit, before=after, tenant=names.tenant)
    known, data, since = _list_named(names), [], time.monotonic()
    for card in cards:
        recipe, current = _find_recipe(names, card.digest, card.body.get("fusion") or known.get(card.digest))
        data.append(
            MeasuredFusion(
                digest=card.digest,
                scorecard_id=card.number,
                created=card.created,
                key=card.key,
                recipe=None if recipe is None else recipe.format(),
                fusion=None if recipe is None else recipe.to_json(),
                current=current,
                scorecard=card.body,
            )
        )
        if time.monotonic() - since > PAUSE_S:
            await asyncio.sleep(0)
            since = time.monotonic()
    last = str(data[-1].scorecard_id) if data else None
    return Page[MeasuredFusion](object="list", data=data, last_id=last, has_more=has_more)


def _list_named(names: Names) -> dict[str, str]:
    """The recipes of the fusions that have a name, by digest."""
    seen = names.seen
    named = {str(one.info["fusion_digest"]): one.recipe.format() for one in seen.adapters.values()}
    return named | {one.digest: one.recipe for versions in seen.versions.values() for one in versions.values()}


def _find_recipe(names: Names, digest: str, value: Any) -> tuple[Recipe | None, bool]:
    """The recipe that a card says it is about, and whether that has this digest now."""
    limits = {"max_weight": float("inf")}
    try:
        recipe = from_json(value, **limits) if isinstance(value, dict) else parse(str(value or ""), **limits)
    except RecipeError:
        return None, False
    try:
        return recipe, names.resolve_recipe(recipe).digest == digest
    except ApiError:
        return recipe, False
