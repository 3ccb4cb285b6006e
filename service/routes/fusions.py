"""`/v1/fusions`: profiles, the dry run, rollback, export."""

import asyncio
import io
import tarfile
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service.data_folder import scratch_folder
from service.defaults import check_defaults
from service.errors import ApiError
from service.fusion_service import FusionService
from service.registry import ProfileVersion
from service.routes import answers_errors, body_of


def view(profile: ProfileVersion) -> dict[str, Any]:
    """JSON form of a profile version."""
    return {"name": profile.name, "object": "fusion", "version": profile.version, **profile.body()}


MAX_DESCRIPTION = 4096
PROFILE_KEYS = {"fusion", "defaults", "description"}


def profile_body(body: dict[str, Any]) -> dict[str, Any]:
    """The checked keys of a profile."""
    if unknown := body.keys() - PROFILE_KEYS:
        known = ", ".join(sorted(PROFILE_KEYS))
        raise ApiError(400, f"Unknown key {min(unknown)!r}; a profile has {known}.", param=min(unknown))
    description = body.get("description") or ""
    if not isinstance(description, str) or len(description) > MAX_DESCRIPTION:
        raise ApiError(400, f"'description' is a text of at most {MAX_DESCRIPTION} characters.", param="description")
    return {
        "fusion": body.get("fusion"),
        "defaults": check_defaults(body.get("defaults")),
        "description": description,
    }


def archive(folder: Path) -> bytes:
    """An uncompressed .tar of the folder's files, the same bytes for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for file in sorted(folder.iterdir()):
            info = tarfile.TarInfo(f"{folder.name}/{file.name}")
            info.size = file.stat().st_size
            with file.open("rb") as content:
                tar.addfile(info, content)
    return buffer.getvalue()


def routes(service: FusionService) -> list[Route]:
    """The fusion routes of `service`."""

    @answers_errors
    async def plan(request: Request) -> Response:
        body = await body_of(request)
        fusion = service.names.resolve_field(body.get("fusion"))
        if fusion is None:
            raise ApiError(400, "The base model alone is no fusion.", param="fusion")
        return JSONResponse(await asyncio.to_thread(service.materializer.plan, fusion, service.pool.place(fusion)))

    @answers_errors
    async def list_all(request: Request) -> Response:
        data = [view(p) for _, p in sorted(service.registry.profiles.items())]
        return JSONResponse({"object": "list", "data": data})

    @answers_errors
    async def one(request: Request) -> Response:
        profile = service.names.profile(request.path_params["profile"], param="profile")
        versions = sorted(service.registry.versions[profile.name])
        return JSONResponse(view(profile) | {"versions": versions})

    @answers_errors
    async def put(request: Request) -> Response:
        profile, new = await service.profiles.put(
            request.path_params["profile"], **profile_body(await body_of(request))
        )
        return JSONResponse(view(profile), status_code=201 if new else 200)

    @answers_errors
    async def remove(request: Request) -> Response:
        await service.profiles.remove(request.path_params["profile"])
        return Response(status_code=204)

    @answers_errors
    async def rollback(request: Request) -> Response:
        version = (await body_of(request)).get("version")
        if not isinstance(version, int) or isinstance(version, bool):
            raise ApiError(400, "'version' must be a whole number.", param="version")
        return JSONResponse(view(await service.profiles.rollback(request.path_params["profile"], version)))

    @answers_errors
    async def export(request: Request) -> Response:
        profile = service.names.profile(request.path_params["profile"], param="profile")
        fusion = service.names.resolve_profile(profile)

        def exported() -> bytes:
            with scratch_folder(service.settings.data, "export") as folder:
                return archive(service.materializer.export(fusion, folder))

        content = await asyncio.to_thread(exported)
        name = f"{profile.name}-{profile.version}.tar"
        headers = {
            "content-disposition": f'attachment; filename="{name}"',
            "x-fusion-digest": profile.digest,
        }
        return Response(content, media_type="application/x-tar", headers=headers)

    return [
        Route("/v1/fusions/plan", plan, methods=["POST"]),
        Route("/v1/fusions", list_all, methods=["GET"]),
        Route("/v1/fusions/{profile}", one, methods=["GET"]),
        Route("/v1/fusions/{profile}", put, methods=["PUT"]),
        Route("/v1/fusions/{profile}", remove, methods=["DELETE"]),
        Route("/v1/fusions/{profile}/rollback", rollback, methods=["POST"]),
        Route("/v1/fusions/{profile}/export", export, methods=["GET"]),
    ]
