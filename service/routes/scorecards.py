"""`/v1/scorecards/{digest}`: measured results of a fusion."""

import asyncio
from typing import Any

from fastapi import Request

from service.errors import ApiError
from service.routes import Service, make_router
from service.routes.schemas import Digest, Scorecard, ScorecardList

MAX_SCORECARD_BYTES = 64 * 1024
MAX_SCORECARDS = 1000

router = make_router("Scorecards", "/v1/scorecards")


@router.post("/{digest}", status_code=201)
async def attach_scorecard(digest: Digest, body: dict[str, Any], request: Request, service: Service) -> Scorecard:
    """Attach a JSON object of any keys to a fusion."""
    if len(await request.body()) > MAX_SCORECARD_BYTES:
        raise ApiError(413, f"A scorecard may have at most {MAX_SCORECARD_BYTES} bytes.")
    if service.registry.scorecard_counts[digest] >= MAX_SCORECARDS:
        raise ApiError(409, f"This fusion already has {MAX_SCORECARDS} scorecards, the maximum.")
    await asyncio.to_thread(service.registry.add_scorecard, digest, body)
    return Scorecard(digest=digest, scorecard=body)


@router.get("/{digest}")
async def list_scorecards(digest: Digest, service: Service) -> ScorecardList:
    """List all results of a fusion."""
    data = await asyncio.to_thread(service.registry.scorecards, digest)
    return ScorecardList(object="list", digest=digest, data=data)
