"""Many files as one zip, made while it is sent, in a few MiB of memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from zipstream import ZipStream

from granite_storage import Attachment

CHUNK = 256 * 1024


class ZipResponse(StreamingResponse):
    """Sends files as a zip, with a length, so that browsers show the progress.

    The zip is made in a thread of its own, at the pace of the client. A download that
    is aborted closes what it has opened.

    Args:
        files: The stored files.
        filename: The name of the zip, in ASCII.
    """

    def __init__(self, files: Iterable[Attachment], filename: str) -> None:
        archive = ZipStream(sized=True)  # not compressed: photographs already are
        for number, file in enumerate(files, 1):
            archive.add(
                _chunks_of(file),
                f"{number:03} {file.original_filename or 'file'}",
                size=file.size,
            )
        headers = {
            "Content-Disposition": f'attachment; filename="{filename}"',
            "Content-Length": str(len(archive)),
        }
        self._chunks = _in_thread(archive.finalize())
        super().__init__(self._chunks, media_type="application/zip", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._chunks):
            await super().__call__(scope, receive, send)


def _chunks_of(file: Attachment) -> Iterator[bytes]:
    with file.sync.open() as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


async def _in_thread(
    chunks: Generator[bytes, None, None],
) -> AsyncGenerator[bytes, None]:
    loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1)
    try:
        while chunk := await loop.run_in_executor(thread, next, chunks, b""):
            yield chunk
    finally:
        thread.submit(chunks.close)  # after the step of a cancelled caller
        thread.shutdown(wait=False)
