"""`/v1/adapters`, and vLLM's `/v1/(un)load_lora_adapter` mapped onto the same registry."""

import asyncio
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from service.errors import ApiError
from service.fusion_service import FusionService
from service.registry import AdapterRecord
from service.routes import answers_errors, body_of, text_of

MEMBERS = {"adapter_config.json", "adapter_model.safetensors"}


def view(record: AdapterRecord) -> dict[str, Any]:
    """JSON form of an adapter; no local paths."""
    return {
        "name": record.name,
        "object": "adapter",
        "digest": record.digest,
        "created": record.created,
        **record.info,
    }


def unpack(file: IO[bytes], folder: Path, limit: int) -> Path:
    """Take the two adapter files out of a .tar, by base name, and nothing else. Returns the folder.

    The archive is not compressed, so that nothing in it is larger than what was sent.
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
        raise ApiError(400, f"The upload is no .tar archive (without compression): {error}.", param="file") from error
    return folder


def routes(service: FusionService) -> list[Route]:
    """The adapter routes of `service`."""
    limit = service.settings.max_upload_bytes

    async def upload(request: Request) -> tuple[AdapterRecord, bool]:
        declared = request.headers.get("content-length", "")
        if not declared.isdigit() or int(declared) > limit + 2**20:
            raise ApiError(413, f"Uploads are limited to {limit} bytes and need a Content-Length.")
        async with request.form(max_files=1, max_fields=4) as form:
            name, file = form.get("name"), form.get("file")
            if not isinstance(name, str) or file is None or isinstance(file, str):
                raise ApiError(400, "A multipart upload has the parts 'name' and 'file' (a .tar).")
            folder = Path(tempfile.mkdtemp(prefix="upload-", dir=service.settings.data))
            try:
                await asyncio.to_thread(unpack, file.file, folder, limit)
                return await service.catalog.add(name, folder)
            finally:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    @answers_errors
    async def create(request: Request) -> Response:
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            record, new = await upload(request)
        else:
            body = await body_of(request)
            name, path = text_of(body, "name"), service.catalog.allowed_path(text_of(body, "path"))
            record, new = await service.catalog.add(name, path)
        return JSONResponse(view(record), status_code=201 if new else 200)

    @answers_errors
    async def list_all(request: Request) -> Response:
        data = [view(r) for _, r in sorted(service.registry.adapters.items())]
        return JSONResponse({"object": "list", "data": data})

    @answers_errors
    async def one(request: Request) -> Response:
        name = request.path_params["name"]
        record = service.registry.adapters.get(name)
        if record is None:
            raise service.names.unknown("adapter", name, service.registry.adapters, "name")
        users = service.registry.pinning_profiles(record.digest)
        return JSONResponse(view(record) | {"profiles": users})

    @answers_errors
    async def remove(request: Request) -> Response:
        await service.catalog.remove(request.path_params["name"])
        return Response(status_code=204)

    @answers_errors
    async def load_lora(request: Request) -> Response:
        body = await body_of(request)
        name, path = text_of(body, "lora_name"), text_of(body, "lora_path")
        _, new = await service.catalog.add(name, service.catalog.allowed_path(path))
        if not new and not body.get("load_inplace"):
            raise ApiError(400, f"The lora adapter {name!r} has already been loaded.")
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @answers_errors
    async def unload_lora(request: Request) -> Response:
        name = text_of(await body_of(request), "lora_name")
        await service.catalog.remove(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return [
        Route("/v1/adapters", create, methods=["POST"]),
        Route("/v1/adapters", list_all, methods=["GET"]),
        Route("/v1/adapters/{name}", one, methods=["GET"]),
        Route("/v1/adapters/{name}", remove, methods=["DELETE"]),
        Route("/v1/load_lora_adapter", load_lora, methods=["POST"]),
        Route("/v1/unload_lora_adapter", unload_lora, methods=["POST"]),
    ]
