"""Adapters in the body of a request: as a .tar of the two files, or as the bytes of a weights file.

The second is for training loops, which have no disk in common with the server: the body is what
`safetensors.torch.save` returns, the query says the rest.
"""

import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from adapters import AdapterError, LoraAdapter, load
from adapters.files import join_parts, unpack_adapter
from service.data_folder import scratch_folder
from service.edge.media_types import MULTIPART, WEIGHTS_TYPES, media_type
from service.errors import ApiError, api_error
from service.routes.schemas import AnswerOnlyKey, BaseMatchKey, Name
from service.validation import MAX_QUOTED, StrictModel

Body = TypeVar("Body", bound=BaseModel)
MAX_FIELDS = 8
WEIGHTS_KEYS = frozenset({"config", "r", "lora_alpha", "use_rslora"})
"""What is said of weights alone."""
IN_MEMORY_BYTES = 2**20
"""Of the body; what is more goes to a temporary file, as the file of a form does."""


class UploadFields(StrictModel):
    """What is said of an upload: in the query beside weights, in the other parts of a form."""

    model_config = ConfigDict(extra="forbid", strict=False)  # all of it is text

    name: Name
    replace: bool = Field(default=False, description="let the name of an adapter stand for this one from now on")
    base_match: BaseMatchKey = None
    answer_only: AnswerOnlyKey = None
    config: str = Field(default="", description="the text of adapter_config.json; of weights only, as all that follows")
    r: int | None = Field(default=None, description="LoRA rank, instead of the one in `config`")
    lora_alpha: float | None = Field(default=None, description="instead of the one in `config`")
    use_rslora: bool | None = Field(default=None, description="instead of the one in `config`")

    @property
    def values(self) -> Mapping[str, Any]:
        """What is said instead of, or over, `config`."""
        return self.model_dump(include={"r", "lora_alpha", "use_rslora"}, exclude_none=True)


class Upload(NamedTuple):
    """An upload that has been received; `read` reads the adapter, in a thread."""

    fields: UploadFields
    file: IO[bytes]
    holds_weights: bool

    def read(self, data: Path) -> LoraAdapter:
        """The adapter, unpacked for as long as that takes in a folder of `data`."""
        with scratch_folder(data, "upload") as folder:
            try:
                if self.holds_weights:
                    join_parts(self.file, self.fields.config.encode(), self.fields.values, folder)
                else:
                    self.file.seek(0)
                    unpack_adapter(self.file, folder)  # never larger than what was sent
            except AdapterError as error:
                raise api_error(error, param="config" if self.holds_weights else "file") from error
            return load(folder)


@asynccontextmanager
async def receive_upload(request: Request) -> AsyncIterator[Upload]:
    """The upload in the body, for the block; 400 for what is none."""
    if media_type(request.scope) in WEIGHTS_TYPES:
        fields = validate(UploadFields, _read_once(request.query_params.multi_items()))
        with tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES) as file:
            upload = UploadFile(file)  # type: ignore[arg-type]  # a BinaryIO in all but its declaration
            async for part in request.stream():
                await upload.write(part)
            yield Upload(fields, file, holds_weights=True)
    else:
        async with request.form(max_files=2, max_fields=MAX_FIELDS) as form:
            parts = _read_once(form.multi_items())
            files = {key: part for key, part in parts.items() if isinstance(part, UploadFile)}
            texts = {key: part for key, part in parts.items() if isinstance(part, str)}
            if (config := files.pop("config", None)) is not None:
                texts["config"] = (await config.read()).decode(errors="replace")
            kind = next(iter(files), "")
            if len(files) != 1 or kind not in ("file", "weights"):
                message = "A multipart upload needs the parts 'name' and 'file' (a .tar), or 'name', 'weights' (a "
                raise ApiError(400, f"{message}safetensors file) and 'config' (an adapter_config.json).")
            fields = validate(UploadFields, texts)
            if kind == "file" and (unused := texts.keys() & WEIGHTS_KEYS):
                message = f"{min(unused)!r} goes with the part 'weights'; a .tar has an adapter_config.json of its own."
                raise ApiError(400, message, param=min(unused))
            yield Upload(fields, files[kind].file, holds_weights=kind == "weights")


def _read_once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict; 400 when a key comes twice."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            message = f"{key[:MAX_QUOTED]!r} is given twice; give it once."
            raise ApiError(400, message, param=key[:MAX_QUOTED])
        content[key] = value
    return content


def validate(model: type[Body], content: Any) -> Body:
    """`content` as a `model`; its faults as those of a body that FastAPI reads."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]) from error


_SCHEMA = UploadFields.model_json_schema()["properties"]
_BINARY = {"type": "string", "format": "binary"}
PARAMETERS = [
    {
        "name": "X-Fusion-Upload",
        "in": "header",
        "required": False,
        "schema": {"const": "1"},
        "description": f"required with {MULTIPART} and weights: web pages of other sites cannot send it",
    },
    *(
        {"name": key, "in": "query", "required": False, "schema": schema, "description": "beside weights as the body"}
        for key, schema in _SCHEMA.items()
    ),
]
FORM_SCHEMA = {
    "type": "object",
    "required": ["name"],
    "properties": {**_SCHEMA, "file": _BINARY, "weights": _BINARY},
}
CONTENT = {MULTIPART: {"schema": FORM_SCHEMA}} | {kind: {"schema": _BINARY} for kind in WEIGHTS_TYPES}
