"""Exports: made in threads, sent part by part from files that have no name, so that nothing stays behind."""

import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.adapter_files import AdapterFiles
from service.data_folder import scratch_folder
from service.materializer import Materializer
from service.resolve import Fusion
from service.threads import Threads

PART_BYTES = 2**20


def archive(folder: Path, file: IO[bytes]) -> None:
    """Write an uncompressed .tar of the folder's files, the same bytes for the same files."""
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            info = tarfile.TarInfo(f"{folder.name}/{path.name}")
            info.size = path.stat().st_size
            with path.open("rb") as content:
                tar.addfile(info, content)


@dataclass(frozen=True, slots=True)
class Export:
    """A .tar that vanishes when it is closed."""

    file: IO[bytes]
    size: int
    threads: Threads

    async def read(self) -> bytes:
        """The next part."""
        return await self.threads.files.run(self.file.read, PART_BYTES)

    def close(self) -> None:
        """Delete the file."""
        self.threads.files.start(self.file.close)  # which frees its disk


class Exports:
    """Makes exports. Each takes its size on the disk until it is closed; `LimitBodies` bounds how many there are."""

    def __init__(self, data: Path, materializer: Materializer, files: AdapterFiles, threads: Threads) -> None:
        self._threads = threads
        self._data = data
        self._materializer = materializer
        self._files = files

    async def make(self, fusion: Fusion) -> Export:
        """The fusion as one .tar, which the caller closes; old builds make room for it on a full disk."""
        async with self._files.hold(fusion.parents.values()):
            file = await self._files.retry_when_full(lambda: self._threads.exports.run(self._write, fusion))
        return Export(file, file.seek(0, 2), self._threads)

    def _write(self, fusion: Fusion) -> IO[bytes]:
        file = tempfile.TemporaryFile(dir=self._data)  # noqa: SIM115 - it outlives this call
        try:
            with scratch_folder(self._data, "export") as folder:
                archive(self._materializer.export(fusion, folder), file)
        except BaseException:
            file.close()
            raise
        return file


class ExportResponse(Response):
    """Sends an export and closes it, whatever becomes of the client."""

    def __init__(self, export: Export, *, media_type: str, headers: Mapping[str, str]) -> None:
        super().__init__(None, media_type=media_type, headers={**headers, "content-length": str(export.size)})
        self._export = export

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it part by part, as fast as the client reads."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._export.file.seek(0)
            left = self._export.size
            while left > 0:
                part = await self._export.read()
                left -= len(part)
                await send({"type": "http.response.body", "body": part, "more_body": left > 0})
        finally:
            self._export.close()
