"""`/v1/adapters`, and vLLM's `/v1/(un)load_lora_adapter` mapped onto the same registry."""

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse

from service.catalog import MISMATCH
from service.edge.media_types import is_upload
from service.errors import ApiError
from service.records import AdapterRecord
from service.routes import Client, Service, make_router
from service.routes.paging import MAX_LIMIT, After, Limit, page_names
from service.routes.schemas import Adapter, AdapterBody, Damaged, LoadLoraBody, Page, UnloadLoraBody
from service.routes.uploads import CONTENT, PARAMETERS, receive_upload, validate

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
    if notes := record.info.get("notes"):
        card.notes = str(notes).split("\n")
    if record.digest in damage:
        card.state, card.reason = "damaged", f"its stored files: {damage[record.digest]}"
    return card


def damaged_card(service: "FusionService", name: str) -> Damaged:
    """The JSON form of an adapter whose record cannot be read."""
    reason = service.registry.snapshot.damaged_adapters[name]
    return Damaged(name=name, object="adapter", state="damaged", reason=f"its record: {reason}")


CREATE_CONTENT = {"application/json": {"schema": AdapterBody.model_json_schema()}, **CONTENT}


@router.post(
    "/v1/adapters",
    response_model_exclude_unset=True,
    responses={201: {"model": Adapter}},
    openapi_extra={"parameters": PARAMETERS, "requestBody": {"required": True, "content": CREATE_CONTENT}},
)
async def register_adapter(request: Request, service: Service, client: Client, response: Response) -> Adapter:
    """Register a folder, an uploaded uncompressed .tar of one, or a weights file; 200 if the name is in use already."""
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
        path = await service.threads.files.run(service.catalog.resolve_path, body.path)
        record, new = await service.catalog.add(
            body.name,
            path,
            client=client,
            replace=body.replace,
            base_match=body.base_match,
            answer_only=body.answer_only,
        )
    response.status_code = 201 if new else 200
    return adapter_card(record, service.materializer.damage)


@router.get("/v1/adapters", response_model_exclude_unset=True)
async def list_adapters(service: Service, limit: Limit = MAX_LIMIT, after: After = "") -> Page[Adapter | Damaged]:
    """List adapters by name."""
    snapshot, damage = service.registry.snapshot, service.materializer.damage
    names, has_more = page_names({*snapshot.adapters, *snapshot.damaged_adapters}, limit, after)
    data = [
        adapter_card(snapshot.adapters[name], damage) if name in snapshot.adapters else damaged_card(service, name)
        for name in names
    ]
    last = names[-1] if names else None
    return Page[Adapter | Damaged](object="list", data=data, last_id=last, has_more=has_more)


@router.get("/v1/adapters/{name:name}", response_model_exclude_unset=True)
async def show_adapter(name: str, service: Service) -> Adapter | Damaged:
    """Show an adapter and the profiles that use it."""
    if name in service.registry.snapshot.damaged_adapters:
        return damaged_card(service, name)
    record = service.registry.adapters.get(name)
    if record is None:
        raise service.names.not_found("adapter", name, service.registry.adapters, "name")
    card = adapter_card(record, service.materializer.damage)
    card.profiles = service.registry.pinning_profiles(record.digest)
    return card


@router.delete("/v1/adapters/{name:name}", status_code=204)
async def remove_adapter(name: str, service: Service) -> None:
    """Remove an adapter that no profile names; running requests finish first."""
    await service.catalog.remove(name)


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadLoraBody, service: Service, client: Client) -> str:
    """Register a folder, with vLLM's body and answer; with `load_inplace` in the place of an adapter of that name."""
    path = await service.threads.files.run(service.catalog.resolve_path, body.lora_path)
    record, new = await service.catalog.add(
        body.lora_name,
        path,
        client=client,
        replace=body.load_inplace,
        base_match=body.base_match,
        answer_only=body.answer_only,
    )
    if not new and not body.load_inplace:
        raise ApiError(400, f"The lora adapter {body.lora_name!r} has already been loaded; pass load_inplace=true.")
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
