"""`/v1/scorecards`: measured results of fusions."""

from typing import Annotated, Any

from fastapi import Path, Query, Request

from service.errors import ApiError
from service.routes import SeenNames, Sender, Service, Tenant, make_router
from service.routes.paging import MAX_LIMIT, After, Limit, page_names
from service.routes.schemas import Digest, Page, Scorecard, ScorecardCount, ScorecardPage
from service.scorecards import MAX_SCORECARD_BYTES

CardId = Annotated[int, Path(ge=1, le=2**31 - 1)]
AfterId = Annotated[int, Query(ge=0, le=2**31 - 1, description="`last_id` of the part before")]

router = make_router("Scorecards", "/v1/scorecards")


@router.get("")
async def count_scorecards(names: SeenNames, limit: Limit = MAX_LIMIT, after: After = "") -> Page[ScorecardCount]:
    """List the fusions that have results, and how many."""
    seen = names.seen
    digests, has_more = page_names(seen.list_scored(), limit, after)
    data = [
        ScorecardCount(digest=digest, count=seen.count_scorecards(digest), bytes=seen.measure_scorecards(digest))
        for digest in digests
    ]
    last = digests[-1] if digests else None
    return Page[ScorecardCount](object="list", data=data, last_id=last, has_more=has_more)


@router.post("/{digest}", status_code=201)
async def attach_scorecard(
    digest: Digest, body: dict[str, Any], request: Request, service: Service, names: SeenNames, caller: Sender
) -> Scorecard:
    """Attach a JSON object of any keys to a fusion; its key `fusion` may hold the recipe."""
    if len(await request.body()) > MAX_SCORECARD_BYTES:
        raise ApiError(413, f"A scorecard may have at most {MAX_SCORECARD_BYTES} bytes.")
    if not names.knows(digest):
        fusion = None if (recipe := body.get("fusion")) is None else names.resolve_field(recipe)
        if fusion is None or fusion.digest != digest:
            message = "There is no fusion with this digest: add its recipe as 'fusion', over adapters that there are."
            raise ApiError(404, message, param="digest")
    number = await service.scorecards.add(digest, body, tenant=names.tenant, key=caller.key)
    return Scorecard(digest=digest, scorecard_id=number, scorecard=body)


@router.get("/{digest}")
async def list_scorecards(
    digest: Digest, service: Service, tenant: Tenant, limit: Limit = MAX_LIMIT, after: AfterId = 0
) -> ScorecardPage:
    """List results of a fusion, oldest first."""
    cards, has_more = await service.scorecards.read(digest, limit=limit, after=after, tenant=tenant)
    last = str(cards[-1]["scorecard_id"]) if cards else None
    return ScorecardPage(object="list", digest=digest, data=cards, last_id=last, has_more=has_more)


@router.delete("/{digest}", status_code=204)
async def remove_scorecards(digest: Digest, service: Service, tenant: Tenant) -> None:
    """Delete all results of a fusion that are the tenant's own."""
    await service.scorecards.remove(digest, tenant=tenant)


@router.delete("/{digest}/{scorecard_id}", status_code=204)
async def remove_scorecard(digest: Digest, scorecard_id: CardId, service: Service, tenant: Tenant) -> None:
    """Delete one result of a fusion, of the tenant's own."""
    await service.scorecards.remove(digest, scorecard_id, tenant=tenant)
