"""`/v1/adapters`, and vLLM's `/v1/(un)load_lora_adapter` mapped onto the same registry."""

import asyncio
import shutil
import tarfile
from pathlib import Path
from typing import IO

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from pydantic import ValidationError

from service.data_folder import scratch_folder
from service.errors import ApiError
from service.registry import AdapterRecord
from service.routes import Service, make_router
from service.routes.schemas import Adapter, AdapterBody, Listing, LoadLoraBody, UnloadLoraBody

MEMBERS = {"adapter_config.json", "adapter_model.safetensors"}
UPLOAD_OVERHEAD = 2**20
"""Bytes of a multipart body that are not the archive: boundaries, headers and the other parts."""

router = make_router("Adapters")


def adapter_card(record: AdapterRecord) -> Adapter:
    """The JSON form of an adapter; no local paths."""
    return Adapter(name=record.name, object="adapter", digest=record.digest, created=record.created, **record.info)


def unpack(file: IO[bytes], folder: Path, limit: int) -> Path:
    """Extract the two adapter files of a .tar, by base name, and nothing else. Returns the folder.

    Compressed archives are refused, so that nothing in one is larger than what was sent.
    """
    left = limit
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = Path(member.name).name
                if name not in MEMBERS or not member.isfile():
                    continue
                left -= member.size
                if left < 0:
                    raise ApiError(413, f"The upload unpacks to more than {limit} bytes.")
                source = archive.extractfile(member)
                assert source is not None  # a plain file, see above
                with (folder / name).open("wb") as out:
                    shutil.copyfileobj(source, out)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ApiError(400, f"The upload is not an uncompressed .tar archive: {error}.", param="file") from error
    return folder


async def upload(request: Request, service: Service) -> tuple[AdapterRecord, bool]:
    """Register the adapter of a multipart body."""
    limit = service.settings.max_upload_bytes
    declared = request.headers.get("content-length", "")
    if not declared.isdigit() or int(declared) > limit + UPLOAD_OVERHEAD:
        raise ApiError(413, f"Uploads are limited to {limit} bytes and need a Content-Length.")
    async with request.form(max_files=1, max_fields=4) as form:
        name, file = form.get("name"), form.get("file")
        if not isinstance(name, str) or file is None or isinstance(file, str):
            raise ApiError(400, "A multipart upload needs the parts 'name' and 'file' (a .tar).")
        async with scratch_folder(service.settings.data, "upload") as folder:
            await asyncio.to_thread(unpack, file.file, folder, limit)
            return await service.catalog.add(name, folder)


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
    openapi_extra={"requestBody": {"required": True, "content": CREATE_CONTENT}},
)
async def register_adapter(request: Request, service: Service, response: Response) -> Adapter:
    """Register a folder the server can read, or an uploaded uncompressed .tar of one; 200 if already registered."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        record, new = await upload(request, service)
    else:
        try:
            body = AdapterBody.model_validate(await request.json())
        except ValidationError as error:
            faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
            raise RequestValidationError(faults) from error
        record, new = await service.catalog.add(body.name, service.catalog.resolve_path(body.path))
    response.status_code = 201 if new else 200
    return adapter_card(record)


@router.get("/v1/adapters", response_model_exclude_unset=True)
async def list_adapters(service: Service) -> Listing[Adapter]:
    """List all adapters."""
    records = sorted(service.registry.adapters.items())
    return Listing[Adapter](object="list", data=[adapter_card(record) for _, record in records])


@router.get("/v1/adapters/{name}")
async def show_adapter(name: str, service: Service) -> Adapter:
    """Show an adapter and the profiles that use it."""
    record = service.registry.adapters.get(name)
    if record is None:
        raise service.names.not_found("adapter", name, service.registry.adapters, "name")
    card = adapter_card(record)
    card.profiles = service.registry.pinning_profiles(record.digest)
    return card


@router.delete("/v1/adapters/{name}", status_code=204)
async def remove_adapter(name: str, service: Service) -> None:
    """Remove an adapter that no profile uses; running requests finish first."""
    await service.catalog.remove(name)


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadLoraBody, service: Service) -> str:
    """Register a folder, with vLLM's body and answer."""
    _, new = await service.catalog.add(body.lora_name, service.catalog.resolve_path(body.lora_path))
    if not new and not body.load_inplace:
        raise ApiError(400, f"The lora adapter {body.lora_name!r} has already been loaded; pass load_inplace=true.")
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadLoraBody, service: Service) -> str:
    """Remove an adapter, with vLLM's body and answer."""
    await service.catalog.remove(body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."
