"""`/v1/fusions`: profiles, their versions and export, and the dry run of a fusion."""

import re
from typing import Any

from fastapi import Response

from service.admission import count_build
from service.callers import Caller
from service.default_check import check_defaults
from service.engine.templates import TemplateError, TemplatesBusyError
from service.errors import ApiError
from service.exports import ExportResponse
from service.hidden import list_hidden
from service.records import ProfileVersion
from service.registry import to_json
from service.resolve import Names
from service.routes import Client, SeenNames, Sender, Service, Tenant, When, make_router
from service.routes.paging import MAX_LIMIT, After, Limit, page_names
from service.routes.schemas import Damaged, Page, Plan, PlanBody, PolicyVerdict, Profile, ProfileBody, RollbackBody
from service.routes.state_schemas import FusionStatus
from service.routes.status import find_status
from service.scorecards import MAX_PAGE_BYTES

TAR = "application/x-tar"

router = make_router("Fusions", "/v1/fusions")


def profile_card(version: ProfileVersion, caller: Caller, missing: str | None = None) -> Profile:
    """The JSON form of a profile version for `caller`; `missing` is its first adapter without a record."""
    card = Profile(name=version.name, object="fusion", version=version.version, **version.body())
    if hidden := list_hidden(version, caller):
        card.defaults = {key: value for key, value in version.defaults.items() if key not in hidden}
        card.hidden = hidden
    if caller.tenant and not version.tenant:
        card.public = True
    if missing is not None:
        card.state, card.reason = "damaged", f"no adapter is registered with the content of its {missing!r}"
    return card


def damaged_card(names: Names, name: str) -> Damaged:
    """The JSON form of a profile without a current version that can be read."""
    reason = names.seen.damaged_profiles[name]
    return Damaged(name=name, object="fusion", state="damaged", reason=reason)


@router.post("/plan", response_model_exclude_unset=True)
async def plan_fusion(body: PlanBody, service: Service, names: SeenNames, client: Client, caller: Sender) -> Plan:
    """Say how a fusion would be served and what that costs, without building it, and whether the policy allows it."""
    fusion = names.resolve_field(body.fusion)
    if fusion is None:
        raise ApiError(400, "The base model alone is not a fusion; name a recipe or a profile.", param="fusion")
    placement = service.pool.place(fusion)
    async with service.files.hold(fusion.parents.values()):
        await service.pool.check_weights(fusion, placement, client)
        plan = await service.threads.plans.run(service.materializer.plan, fusion, placement)
    verdict = await service.policy.judge(fusion, caller)
    state = PolicyVerdict(id=service.policy.id, allowed=verdict.allowed, rule=verdict.rule, reason=verdict.reason)
    return Plan(stack=service.pool.home_key(fusion), policy=state, **plan)


@router.get("", response_model_exclude_unset=True)
async def list_profiles(
    names: SeenNames, caller: Sender, limit: Limit = MAX_LIMIT, after: After = ""
) -> Page[Profile | Damaged]:
    """List profiles by name."""
    seen = names.seen
    part, has_more = page_names({*seen.profiles, *seen.damaged_profiles}, limit, after)
    data: list[Profile | Damaged] = []
    size = 0
    for name in part:
        if size >= MAX_PAGE_BYTES:
            has_more = True
            break
        if name in seen.profiles:
            version = seen.profiles[name]
            size += len(to_json(version.body()))
            data.append(profile_card(version, caller, names.find_missing(version)))
        else:
            data.append(damaged_card(names, name))
    last = data[-1].name if data else None
    return Page[Profile | Damaged](object="list", data=data, last_id=last, has_more=has_more)


@router.get("/{profile:profile}", response_model_exclude_unset=True)
async def show_profile(
    profile: str, service: Service, names: SeenNames, caller: Sender, response: Response
) -> Profile | Damaged:
    """Show a profile, or one version of it as `name@3`."""
    if profile in names.seen.damaged_profiles:
        response.headers["etag"] = str(service.registry.tag_profile(names.seen.find_key(profile)))
        return damaged_card(names, profile)
    version = names.profile(profile, param="profile")
    card = profile_card(version, caller, names.find_missing(version))
    card.versions = sorted(service.registry.version_numbers(version.key))
    _set_tag(response, service, version)
    return card


def _set_tag(response: Response, service: Service, version: ProfileVersion) -> None:
    response.headers["etag"] = str(service.registry.tag_profile(version.key, version.version))


async def check_template(service: Service, template: str) -> None:
    """Raise `ApiError` unless the profile may have this chat template and it can be rendered within the limits."""
    try:
        await service.engine.check_template(template)
    except TemplateError as error:
        raise ApiError(400, f"'defaults.chat_template': {error}.", param="defaults.chat_template") from error
    except TemplatesBusyError as error:
        raise ApiError(503, f"{str(error).capitalize()}.") from error


@router.put("/{profile:profile}", response_model_exclude_unset=True, responses={201: {"model": Profile}})
async def put_profile(
    profile: str,
    body: ProfileBody,
    service: Service,
    client: Client,
    tenant: Tenant,
    caller: Sender,
    condition: When,
    response: Response,
) -> Profile:
    """Make a new version the current one; requests in flight finish on the old one."""
    defaults = body.defaults.model_dump(exclude_none=True) if body.defaults else {}
    parts: dict[str, Any] = {"defaults": defaults, "description": body.description or ""}
    fusion = await service.profiles.check(
        profile, body.fusion, parts, tenant=tenant, client=client, caller=caller, condition=condition
    )
    if defaults:
        async with service.pool.checks.hold(client):
            if template := defaults.get("chat_template"):
                await check_template(service, template)
            await check_defaults(service.engine.app, defaults)
    async with count_build(service.limits.find_account(caller), service.pool, fusion):
        version, new = await service.profiles.put(
            profile, body.fusion, tenant=tenant, **parts, client=client, caller=caller, condition=condition
        )
    response.status_code = 201 if new else 200
    _set_tag(response, service, version)
    return profile_card(version, caller)


@router.delete("/{profile:profile}", status_code=204)
async def remove_profile(profile: str, service: Service, tenant: Tenant, condition: When) -> None:
    """Delete a profile and all its versions."""
    await service.profiles.remove(profile, tenant=tenant, condition=condition)


@router.post("/{profile:name}/rollback", response_model_exclude_unset=True)
async def roll_back_profile(
    profile: str,
    body: RollbackBody,
    service: Service,
    tenant: Tenant,
    caller: Sender,
    condition: When,
    response: Response,
) -> Profile:
    """Make an earlier version the current one."""
    version = await service.profiles.rollback(profile, body.version, tenant=tenant, caller=caller, condition=condition)
    _set_tag(response, service, version)
    return profile_card(version, caller)


@router.put("/{profile:name}/pin")
async def pin_profile(
    profile: str,
    service: Service,
    names: SeenNames,
    tenant: Tenant,
    caller: Sender,
    condition: When,
    response: Response,
) -> FusionStatus:
    """Load what serves a profile, and keep it in the engine, also after a restart, until it is unpinned."""
    version = await service.pins.pin(profile, tenant=tenant, caller=caller, condition=condition)
    _set_tag(response, service, version)
    return await find_status(service, names, version)


@router.delete("/{profile:name}/pin", status_code=204)
async def unpin_profile(profile: str, service: Service, tenant: Tenant, condition: When) -> None:
    """Let what serves a profile go when its place is needed."""
    await service.pins.unpin(profile, tenant=tenant, condition=condition)


@router.get("/{profile:name}/status")
async def show_status(profile: str, service: Service, names: SeenNames) -> FusionStatus:
    """Show how a profile, or one version of it, is doing here: in the engine or not, since when unused, how soon."""
    return await find_status(service, names, names.profile(profile, param="profile"))


@router.get("/{profile:name}/export", response_class=Response, responses={200: {"content": {TAR: {}}}})
async def export_profile(profile: str, service: Service, names: SeenNames, caller: Sender) -> Response:
    """Download the fusion as one PEFT adapter, an uncompressed .tar."""
    version = names.profile(profile, param="profile")
    fusion = names.resolve_profile(version)
    await service.policy.check(fusion, caller)
    await service.limits.count_build(caller)
    tar = await service.exports.make(fusion)
    name = f"{re.sub('[/:]', '-', version.name)}-{version.version}.tar"
    headers = {"content-disposition": f'attachment; filename="{name}"', "x-fusion-digest": version.digest}
    return ExportResponse(tar, media_type=TAR, headers=headers)
