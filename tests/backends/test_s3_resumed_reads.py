"""A body that was cut off, and a server that answers the request for its rest with the whole object."""

from __future__ import annotations

import os

import pytest

from granite_storage.backends._resuming import open_resuming
from granite_storage.exceptions import BackendError
from tests.backends.test_s3_faults import rigged
from tests.faults.s3_proxy import Request, cut_body
from tests.servers import S3Server

CONTENT = os.urandom(300_000)


@pytest.fixture
def server(seaweedfs_server: S3Server) -> S3Server:
    """A server whose bucket is made where it may block."""
    assert seaweedfs_server.shared_bucket
    return seaweedfs_server


async def whole(request: Request) -> bytes:
    head, _, _ = (await request.forward()).partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n")[1:] if not line.lower().startswith((b"content-range:", b"content-length:"))]
    return b"\r\n".join([b"HTTP/1.1 200 OK", *lines, b"Content-Length: %d" % len(CONTENT)]) + b"\r\n\r\n" + CONTENT


async def test_no_byte_is_read_twice(server: S3Server) -> None:
    async with rigged(server) as rig:
        await rig.real.put_bytes("a", CONTENT)
        rig.proxy.on("GetObject", cut_body(1000))
        rig.proxy.on("GetObject", whole)
        reader = await open_resuming(rig.backend, "a")
        with pytest.raises(BackendError, match="another range"):
            await reader.read()
        await reader.aclose()
        assert rig.proxy.count()["GetObject"] == 2
