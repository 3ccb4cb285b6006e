"""`/v1/adapters`, and vLLM's `/v1/(un)load_lora_adapter` mapped onto the same registry."""

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, TypedDict

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse

from service.catalog import MISMATCH
from service.edge.media_types import is_upload
from service.errors import ApiError
from service.records import AdapterRecord
from service.routes import Client, Service, make_router
from service.routes.paging import MAX_LIMIT, After, Limit, page_names
from service.routes.schemas import Adapter, AdapterBody, Damaged, Fetching, LoadLoraBody, Page, UnloadLoraBody
from service.routes.uploads import CONTENT, PARAMETERS, receive_upload, validate
from service.settings import BaseMatch
from service.sources.fetches import Fetch, Order
from service.sources.locations import is_remote

if TYPE_CHECKING:
    from service.fusion_service import FusionService

router = make_router("Adapters")


class Options(TypedDict):
    """How an adapter is registered."""

    replace: bool
    base_match: BaseMatch | None
    answer_only: bool | None


INFO = ("rank", "modules", "bytes", "dtype", "fusion_digest", "effect", "norm", "built", "answer_only", MISMATCH)


def adapter_card(record: AdapterRecord, damage: Mapping[str, str]) -> Adapter:
    """The JSON form of an adapter; no local paths. `damage` says what is wrong with stored files, by digest."""
    info = {key: record.info[key] for key in INFO if key in record.info}
    card = Adapter(name=record.name, object="adapter", digest=record.digest, created=record.created, **info)
    if record.gate:
        card.gate = json.loads(record.gate)
    if notes := record.info.get("notes"):
        card.notes = str(notes).split("\n")
    if record.digest in damage:
        card.state, card.reason = "damaged", f"its stored files: {damage[record.digest]}"
    return card


def damaged_card(service: "FusionService", name: str) -> Damaged:
    """The JSON form of an adapter whose record cannot be read."""
    reason = service.registry.snapshot.damaged_adapters[name]
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
    request: Request, service: Service, client: Client, response: Response
) -> Adapter | Fetching:
    """Register a folder, an uploaded uncompressed .tar of one, or a weights file; 200 if the name is in use already.
    A URL is fetched first: 202.
    """
    if is_upload(request.scope):
        async with receive_upload(request) as upload:
            fields = upload.fields
            read = partial(upload.read, service.settings.data)
            record, new = await service.catalog.add_read(
                fields.name,
                read,
                client=client,
                replace=fields.replace,
                base_match=fields.base_match,
                answer_only=fields.answer_only,
            )
    else:
        body = validate(AdapterBody, await request.json())
        if bool(body.path) == bool(body.source):
            raise ApiError(400, "Expected either 'source', a folder or URL, or 'path', a folder.", param="source")
        options: Options = {"replace": body.replace, "base_match": body.base_match, "answer_only": body.answer_only}
        if is_remote(body.source):
            fetch = service.fetches.start(Order(body.name, body.source, client, **options))
            response.status_code = 202
            return fetching_card(fetch)
        record, new = await _add_folder(service, body.name, body.path or body.source, client, options)
    response.status_code = 201 if new else 200
    return adapter_card(record, service.materializer.damage)


async def _add_folder(
    service: "FusionService", name: str, text: str, client: str, options: Options
) -> tuple[AdapterRecord, bool]:
    path = await service.threads.files.run(service.catalog.resolve_path, text)
    return await service.catalog.add(name, path, client=client, **options)


def _any_card(service: "FusionService", name: str) -> Adapter | Damaged | Fetching | None:
    """What there is to say of a name, None for one that is not known."""
    fetch = service.fetches.get(name)
    if name in service.registry.snapshot.damaged_adapters:
        return damaged_card(service, name)
    record = service.registry.adapters.get(name)
    if record is None:
        return None if fetch is None else fetching_card(fetch)
    card = adapter_card(record, service.materializer.damage)
    if fetch is not None:
        card.fetch = fetching_card(fetch)
    return card


@router.get("/v1/adapters", response_model_exclude_unset=True)
async def list_adapters(
    service: Service, limit: Limit = MAX_LIMIT, after: After = ""
) -> Page[Adapter | Damaged | Fetching]:
    """List adapters by name, with those that are being fetched."""
    snapshot = service.registry.snapshot
    known = {*snapshot.adapters, *snapshot.damaged_adapters, *service.fetches.names()}
    names, has_more = page_names(known, limit, after)
    data = [card for name in names if (card := _any_card(service, name)) is not None]
    last = names[-1] if names else None
    return Page[Adapter | Damaged | Fetching](object="list", data=data, last_id=last, has_more=has_more)


@router.get("/v1/adapters/{name:name}", response_model_exclude_unset=True)
async def show_adapter(name: str, service: Service) -> Adapter | Damaged | Fetching:
    """Show an adapter and the profiles that use it, or how far its fetch is."""
    card = _any_card(service, name)
    if card is None:
        raise service.names.not_found("adapter", name, service.registry.adapters, "name")
    if isinstance(card, Adapter):
        card.profiles = service.registry.pinning_profiles(card.digest)
    return card


@router.delete("/v1/adapters/{name:name}", status_code=204)
async def remove_adapter(name: str, service: Service) -> None:
    """Remove an adapter that no profile names, and end its fetch; running requests finish first."""
    if await service.fetches.cancel(name) and name not in service.registry.adapters:
        return
    await service.catalog.remove(name)


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadLoraBody, service: Service, client: Client) -> str:
    """Register a folder, or what a URL holds once it is fetched, with vLLM's body and answer, as often as it is
    asked for; with `load_inplace` in the place of an adapter of that name.
    """
    options: Options = {
        "replace": body.load_inplace,
        "base_match": body.base_match,
        "answer_only": body.answer_only,
    }
    if is_remote(body.lora_path):
        record, _ = await service.fetches.start(Order(body.lora_name, body.lora_path, client, **options)).wait()
    else:
        record, _ = await _add_folder(service, body.lora_name, body.lora_path, client, options)
    answer = f"Success: LoRA adapter '{body.lora_name}' added successfully."
    if (mismatch := record.info.get(MISMATCH)) is not None:
        answer += f" Its base is named {mismatch!r} (base_mismatch): every shape fits."
    if not record.info["effect"]:
        answer += " It has no effect on a probe: it answers as the base does."
    return answer


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadLoraBody, service: Service) -> str:
    """Remove an adapter's name, with vLLM's body and answer; profiles that pin its content keep that."""
    await service.catalog.remove(body.lora_name, even_pinned=True)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."
