"""`/v1/adapters`, and vLLM's `/v1/(un)load_lora_adapter` mapped onto the same registry."""

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse

from service.catalog import MISMATCH, Options
from service.edge.media_types import is_upload
from service.errors import ApiError
from service.records import AdapterRecord
from service.resolve import Names
from service.routes import Client, SeenNames, Sender, Service, Tenant, When, make_router
from service.routes.paging import MAX_LIMIT, After, Limit, page_names
from service.routes.schemas import Adapter, AdapterBody, Damaged, Fetching, LoadLoraBody, Page, UnloadLoraBody
from service.routes.uploads import CONTENT, PARAMETERS, receive_upload, validate
from service.sources.fetches import Fetch, Order
from service.sources.locations import is_remote
from service.tenants import join_key

if TYPE_CHECKING:
    from service.fusion_service import FusionService

router = make_router("Adapters")


INFO = ("rank", "modules", "bytes", "dtype", "fusion_digest", "effect", "norm", "built", "answer_only", MISMATCH)


def adapter_card(record: AdapterRecord, damage: Mapping[str, str]) -> Adapter:
    """The JSON form of an adapter; no local paths. `damage` says what is wrong with stored files, by digest."""
    info = {key: record.info[key] for key in INFO if key in record.info}
    card = Adapter(name=record.name, object="adapter", digest=record.digest, created=record.created, **info)
    if record.gate:
        card.gate = json.loads(record.gate)
    if record.weight_range is not None:
        card.weight_range = record.weight_range
    if notes := record.info.get("notes"):
        card.notes = str(notes).split("\n")
    if record.digest in damage:
        card.state, card.reason = "damaged", f"its stored files: {damage[record.digest]}"
    return card


def damaged_card(names: Names, name: str) -> Damaged:
    """The JSON form of an adapter whose record cannot be read."""
    reason = names.seen.damaged_adapters[name]
    return Damaged(name=name, object="adapter", state="damaged", reason=f"its record: {reason}")


def fetching_card(fetch: Fetch) -> Fetching:
    """The JSON form of a fetch; no credentials."""
    card = Fetching(name=fetch.order.name, object="adapter", source=fetch.order.source, state=fetch.state)
    if fetch.reason:
        card.reason = fetch.reason
    if fetch.state == "fetching":
        progress = fetch.download.progress
        card.bytes, card.bytes_per_s = progress.bytes, round(progress.speed)
        if progress.total:
            card.total_bytes = progress.total
            if progress.speed:
                card.eta_s = round((progress.total - progress.bytes) / progress.speed, 1)
    return card


CREATE_CONTENT = {"application/json": {"schema": AdapterBody.model_json_schema()}, **CONTENT}


@router.post(
    "/v1/adapters",
    response_model_exclude_unset=True,
    responses={201: {"model": Adapter}, 202: {"model": Fetching}},
    openapi_extra={"parameters": PARAMETERS, "requestBody": {"required": True, "content": CREATE_CONTENT}},
)
async def register_adapter(
    request: Request,
    service: Service,
    client: Client,
    tenant: Tenant,
    caller: Sender,
    condition: When,
    response: Response,
) -> Adapter | Fetching:
    """Register a folder, an uploaded uncompressed .tar of one, or a weights file; 200 if the name is in use already.
    A URL is fetched first: 202.
    """
    await service.limits.count_build(caller)
    options: Options = {"tenant": tenant, "client": client, "condition": condition}
    if is_upload(request.scope):
        async with receive_upload(request) as upload:
            fields = upload.fields
            read = partial(upload.read, service.settings.data)
            options |= {
                "replace": fields.replace,
                "base_match": fields.base_match,
                "answer_only": fields.answer_only,
            }
            record, new = await service.catalog.add_read(fields.name, read, **options)
    else:
        body = validate(AdapterBody, await request.json())
        if bool(body.path) == bool(body.source):
            raise ApiError(400, "Expected either 'source', a folder or URL, or 'path', a folder.", param="source")
        options |= {"replace": body.replace, "base_match": body.base_match, "answer_only": body.answer_only}
        if is_remote(body.source):
            fetch = service.fetches.start(_make_order(body.name, body.source, options))
            response.status_code = 202
            return fetching_card(fetch)
        record, new = await _add_folder(service, body.name, body.path or body.source, options)
    response.status_code = 201 if new else 200
    _set_tag(response, service.registry.tag_adapter(record.key))
    return adapter_card(record, service.materializer.damage)


async def _add_folder(service: "FusionService", name: str, text: str, options: Options) -> tuple[AdapterRecord, bool]:
    path = await service.threads.files.run(service.catalog.resolve_path, text)
    return await service.catalog.add(name, path, **options)


def _make_order(name: str, source: str, options: Options) -> Order:
    condition = options["condition"]
    return Order(
        name,
        source,
        options["client"],
        options["replace"],
        options["base_match"],
        options["answer_only"],
        options["tenant"],
        condition.if_match,
        condition.if_none_match,
    )


def _set_tag(response: Response, tag: str | None) -> None:
    if tag is not None:
        response.headers["etag"] = tag


def _any_card(service: "FusionService", names: Names, name: str) -> Adapter | Damaged | Fetching | None:
    """What there is to say of a name, None for one that is not known."""
    fetch = service.fetches.get(name, names.tenant)
    if name in names.seen.damaged_adapters:
        return damaged_card(names, name)
    record = names.seen.adapters.get(name)
    if record is None:
        return None if fetch is None else fetching_card(fetch)
    card = adapter_card(record, service.materializer.damage)
    if names.seen.is_public(name):
        card.public = True
    if fetch is not None:
        card.fetch = fetching_card(fetch)
    return card


@router.get("/v1/adapters", response_model_exclude_unset=True)
async def list_adapters(
    service: Service, names: SeenNames, limit: Limit = MAX_LIMIT, after: After = ""
) -> Page[Adapter | Damaged | Fetching]:
    """List adapters by name, with those that are being fetched."""
    seen = names.seen
    known = {*seen.adapters, *seen.damaged_adapters, *service.fetches.names(names.tenant)}
    part, has_more = page_names(known, limit, after)
    data = [card for name in part if (card := _any_card(service, names, name)) is not None]
    last = part[-1] if part else None
    return Page[Adapter | Damaged | Fetching](object="list", data=data, last_id=last, has_more=has_more)


@router.get("/v1/adapters/{name:name}", response_model_exclude_unset=True)
async def show_adapter(
    name: str, service: Service, names: SeenNames, response: Response
) -> Adapter | Damaged | Fetching:
    """Show an adapter and the profiles that use it, or how far its fetch is."""
    seen = names.seen
    card = _any_card(service, names, name)
    if card is None:
        raise names.not_found("adapter", name, seen.adapters, "name")
    if isinstance(card, Adapter):
        card.profiles = seen.list_users(seen.adapters[name])
    _set_tag(response, service.registry.tag_adapter(seen.find_key(name)))
    return card


@router.delete("/v1/adapters/{name:name}", status_code=204)
async def remove_adapter(name: str, service: Service, tenant: Tenant, condition: When) -> None:
    """Remove an adapter that no profile names, and end its fetch; running requests finish first."""
    key = join_key(tenant, name)
    if (tag := service.registry.tag_adapter(key)) is not None:
        condition.check(tag)
    if await service.fetches.cancel(name, tenant) and key not in service.registry.adapters:
        return
    await service.catalog.remove(name, tenant=tenant, condition=condition)


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(
    body: LoadLoraBody, service: Service, client: Client, tenant: Tenant, caller: Sender, condition: When
) -> str:
    """Register a folder, or what a URL holds once it is fetched, with vLLM's body and answer, as often as it is
    asked for; with `load_inplace` in the place of an adapter of that name.
    """
    await service.limits.count_build(caller)
    options: Options = {
        "replace": body.load_inplace,
        "base_match": body.base_match,
        "answer_only": body.answer_only,
        "tenant": tenant,
        "client": client,
        "condition": condition,
    }
    if is_remote(body.lora_path):
        record, _ = await service.fetches.start(_make_order(body.lora_name, body.lora_path, options)).wait()
    else:
        record, _ = await _add_folder(service, body.lora_name, body.lora_path, options)
    answer = f"Success: LoRA adapter '{body.lora_name}' added successfully."
    if (mismatch := record.info.get(MISMATCH)) is not None:
        answer += f" Its base is named {mismatch!r} (base_mismatch): every shape fits."
    if not record.info["effect"]:
        answer += " It has no effect on a probe: it answers as the base does."
    return answer


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadLoraBody, service: Service, tenant: Tenant, condition: When) -> str:
    """Remove an adapter's name, with vLLM's body and answer; profiles that pin its content keep that."""
    await service.catalog.remove(body.lora_name, tenant=tenant, even_pinned=True, condition=condition)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."
