"""`/v1/fusions`: profiles, their versions and export, and the dry run of a fusion."""

import asyncio
import io
import tarfile
from pathlib import Path

from fastapi import Response

from service.data_folder import scratch_folder
from service.errors import ApiError
from service.registry import ProfileVersion
from service.routes import Service, make_router
from service.routes.schemas import Listing, Plan, PlanBody, Profile, ProfileBody, RollbackBody

TAR = "application/x-tar"

router = make_router("Fusions", "/v1/fusions")


def profile_card(version: ProfileVersion) -> Profile:
    """The JSON form of a profile version."""
    return Profile(name=version.name, object="fusion", version=version.version, **version.body())


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


@router.post("/plan")
async def plan_fusion(body: PlanBody, service: Service) -> Plan:
    """Say how a fusion would be served and what that costs, without building it."""
    fusion = service.names.resolve_field(body.fusion)
    if fusion is None:
        raise ApiError(400, "The base model alone is not a fusion; name a recipe or a profile.", param="fusion")
    placement = service.pool.place(fusion)
    return Plan(**await asyncio.to_thread(service.materializer.plan, fusion, placement))


@router.get("", response_model_exclude_unset=True)
async def list_profiles(service: Service) -> Listing[Profile]:
    """List all profiles."""
    profiles = sorted(service.registry.profiles.items())
    return Listing[Profile](object="list", data=[profile_card(profile) for _, profile in profiles])


@router.get("/{profile}")
async def show_profile(profile: str, service: Service) -> Profile:
    """Show a profile, or one version of it as `name@3`."""
    version = service.names.profile(profile, param="profile")
    card = profile_card(version)
    card.versions = sorted(service.registry.versions[version.name])
    return card


@router.put("/{profile}", response_model_exclude_unset=True, responses={201: {"model": Profile}})
async def put_profile(profile: str, body: ProfileBody, service: Service, response: Response) -> Profile:
    """Make a new version the current one; requests in flight finish on the old one."""
    defaults = body.defaults.model_dump(exclude_none=True) if body.defaults else None
    version, new = await service.profiles.put(
        profile, body.fusion, defaults=defaults, description=body.description or ""
    )
    response.status_code = 201 if new else 200
    return profile_card(version)


@router.delete("/{profile}", status_code=204)
async def remove_profile(profile: str, service: Service) -> None:
    """Delete a profile and all its versions."""
    await service.profiles.remove(profile)


@router.post("/{profile}/rollback", response_model_exclude_unset=True)
async def roll_back_profile(profile: str, body: RollbackBody, service: Service) -> Profile:
    """Make an earlier version the current one."""
    return profile_card(await service.profiles.rollback(profile, body.version))


@router.get("/{profile}/export", response_class=Response, responses={200: {"content": {TAR: {}}}})
async def export_profile(profile: str, service: Service) -> Response:
    """Download the fusion as one PEFT adapter, an uncompressed .tar."""
    version = service.names.profile(profile, param="profile")
    fusion = service.names.resolve_profile(version)
    async with scratch_folder(service.settings.data, "export") as scratch:
        folder = await asyncio.to_thread(service.materializer.export, fusion, scratch)
        content = await asyncio.to_thread(archive, folder)
    name = f"{version.name}-{version.version}.tar"
    headers = {"content-disposition": f'attachment; filename="{name}"', "x-fusion-digest": version.digest}
    return Response(content, media_type=TAR, headers=headers)
