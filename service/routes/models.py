"""`GET /v1/models`: base first, adapters, profiles, each with its `fusion` object; and scorecards."""

import asyncio
import re
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from adapters import parse
from service.errors import ApiError
from service.fusion_service import FusionService
from service.resolve import Fusion
from service.routes import answers_errors, body_of

DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_SCORECARD_BYTES = 64 * 1024
MAX_SCORECARDS = 1000


def routes(service: FusionService) -> list[Route]:
    """The model and scorecard routes of `service`."""
    registry, names = service.registry, service.names

    def entry(name: str, created: str, fusion: Fusion | None) -> dict[str, Any]:
        card: dict[str, Any] = {
            "id": name,
            "object": "model",
            "created": int(datetime.fromisoformat(created).timestamp()) if created else 0,
            "owned_by": "lora-fusion",
            "parent": None if fusion is None else names.base,
            "fusion": None,
        }
        if fusion is None:
            card["max_model_len"] = service.engine.config.model_config.max_model_len
            return card
        state, reason = service.pool.state(fusion)
        card["fusion"] = {
            "recipe": fusion.recipe.format(),
            "digest": fusion.digest,
            "rank": fusion.rank,
            "state": state,
            "scorecards": registry.scorecard_counts.get(fusion.digest, 0),
        }
        if reason is not None:
            card["fusion"]["reason"] = reason
        if fusion.profile is not None:
            card["fusion"]["version"] = fusion.profile.version
        return card

    def cards() -> list[dict[str, Any]]:
        found = [entry(names.base, "", None)]
        found += [entry(n, r.created, names.resolve_recipe(parse(n))) for n, r in sorted(registry.adapters.items())]
        found += [entry(n, p.created, names.resolve_profile(p)) for n, p in sorted(registry.profiles.items())]
        return found

    @answers_errors
    async def list_all(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": cards()})

    @answers_errors
    async def one(request: Request) -> Response:
        text = request.path_params["name"]
        fusion = names.look_up(text)
        created = "" if fusion is None or fusion.profile is None else fusion.profile.created
        return JSONResponse(entry(text, created, fusion))

    def digest_of(request: Request) -> str:
        digest: str = request.path_params["digest"]
        if not DIGEST.fullmatch(digest):
            raise ApiError(400, "A fusion digest has 64 hexadecimal digits.", param="digest")
        return digest

    @answers_errors
    async def attach(request: Request) -> Response:
        digest, body = digest_of(request), await body_of(request)
        if len(await request.body()) > MAX_SCORECARD_BYTES:
            raise ApiError(413, f"A scorecard has at most {MAX_SCORECARD_BYTES} bytes.")
        if registry.scorecard_counts[digest] >= MAX_SCORECARDS:
            raise ApiError(409, f"This fusion has {MAX_SCORECARDS} scorecards, the most there can be.")
        await asyncio.to_thread(registry.add_scorecard, digest, body)
        return JSONResponse({"digest": digest, "scorecard": body}, status_code=201)

    @answers_errors
    async def read(request: Request) -> Response:
        digest = digest_of(request)
        data = await asyncio.to_thread(registry.scorecards, digest)
        return JSONResponse({"object": "list", "digest": digest, "data": data})

    return [
        Route("/v1/models", list_all, methods=["GET"]),
        Route("/v1/models/{name:path}", one, methods=["GET"]),
        Route("/v1/scorecards/{digest}", attach, methods=["POST"]),
        Route("/v1/scorecards/{digest}", read, methods=["GET"]),
    ]
