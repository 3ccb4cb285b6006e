"""`/v1/adapters`, and vLLM's `/v1/(un)load_lora_adapter` mapped onto the same registry."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from pydantic import ValidationError

from adapters import AdapterError, LoraAdapter, load
from adapters.files import unpack_adapter
from service.data_folder import scratch_folder
from service.edge.media_types import is_upload
from service.errors import ApiError, api_error
from service.records import AdapterRecord
from service.routes import Client, Service, make_router
from service.routes.paging import MAX_LIMIT, After, Limit, page_names
from service.routes.schemas import Adapter, AdapterBody, Damaged, LoadLoraBody, Page, UnloadLoraBody

if TYPE_CHECKING:
    from service.fusion_service import FusionService

router = make_router("Adapters")


INFO = ("rank", "modules", "bytes", "dtype", "fusion_digest", "effect", "norm")


def adapter_card(record: AdapterRecord, damage: Mapping[str, str]) -> Adapter:
    """The JSON form of an adapter; no local paths. `damage` says what is wrong with stored files, by digest."""
    info = {key: record.info[key] for key in INFO if key in record.info}
    card = Adapter(name=record.name, object="adapter", digest=record.digest, created=record.created, **info)
    if record.digest in damage:
        card.state, card.reason = "damaged", f"its stored files: {damage[record.digest]}"
    return card


def damaged_card(service: "FusionService", name: str) -> Damaged:
    """The JSON form of an adapter whose record cannot be read."""
    reason = service.registry.snapshot.damaged_adapters[name]
    return Damaged(name=name, object="adapter", state="damaged", reason=f"its record: {reason}")


def unpack(file: IO[bytes], folder: Path) -> None:
    """Extract the two adapter files of a .tar; 400 unless it is a plain one. It is never larger than what was sent."""
    try:
        unpack_adapter(file, folder)
    except AdapterError as error:
        raise api_error(error, param="file") from error


def read_upload(file: IO[bytes], data: Path) -> LoraAdapter:
    """The adapter in a .tar, unpacked for as long as that takes in a folder of `data`."""
    file.seek(0)
    with scratch_folder(data, "upload") as folder:
        unpack(file, folder)
        return load(folder)


async def upload(request: Request, service: Service, client: Client) -> tuple[AdapterRecord, bool]:
    """Register the adapter of a multipart body."""
    async with request.form(max_files=1, max_fields=4) as form:
        name, file = form.get("name"), form.get("file")
        if not isinstance(name, str) or file is None or isinstance(file, str):
            raise ApiError(400, "A multipart upload needs the parts 'name' and 'file' (a .tar).")
        read = partial(read_upload, file.file, service.settings.data)
        return await service.catalog.add_read(name, read, client=client)


UPLOAD_HEADER = {
    "name": "X-Fusion-Upload",
    "in": "header",
    "required": False,
    "schema": {"const": "1"},
    "description": "required with multipart/form-data: web pages of other sites cannot send it",
}
UPLOAD_SCHEMA = {
    "type": "object",
    "required": ["name", "file"],
    "properties": {"name": {"type": "string"}, "file": {"type": "string", "format": "binary"}},
}
CREATE_CONTENT = {
    "application/json": {"schema": AdapterBody.model_json_schema()},
    "multipart/form-data": {"schema": UPLOAD_SCHEMA},
}


@router.post(
    "/v1/adapters",
    response_model_exclude_unset=True,
    responses={201: {"model": Adapter}},
    openapi_extra={"parameters": [UPLOAD_HEADER], "requestBody": {"required": True, "content": CREATE_CONTENT}},
)
async def register_adapter(request: Request, service: Service, client: Client, response: Response) -> Adapter:
    """Register a folder the server can read, or an uploaded uncompressed .tar of one; 200 if already registered."""
    if is_upload(request.scope):
        record, new = await upload(request, service, client)
    else:
        try:
            body = AdapterBody.model_validate(await request.json())
        except ValidationError as error:
            faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
            raise RequestValidationError(faults) from error
        path = await service.threads.files.run(service.catalog.resolve_path, body.path)
        record, new = await service.catalog.add(body.name, path, client=client)
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


@router.get("/v1/adapters/{name}", response_model_exclude_unset=True)
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


@router.delete("/v1/adapters/{name}", status_code=204)
async def remove_adapter(name: str, service: Service) -> None:
    """Remove an adapter that no profile uses; running requests finish first."""
    await service.catalog.remove(name)


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadLoraBody, service: Service, client: Client) -> str:
    """Register a folder, with vLLM's body and answer."""
    path = await service.threads.files.run(service.catalog.resolve_path, body.lora_path)
    _, new = await service.catalog.add(body.lora_name, path, client=client)
    if not new and not body.load_inplace:
        raise ApiError(400, f"The lora adapter {body.lora_name!r} has already been loaded; pass load_inplace=true.")
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadLoraBody, service: Service) -> str:
    """Remove an adapter, with vLLM's body and answer."""
    await service.catalog.remove(body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."
