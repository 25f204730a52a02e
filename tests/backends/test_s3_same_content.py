"""Two writers of the same bytes to one location of S3: which of them created the object is told by its id, not by its bytes."""

from __future__ import annotations

import pytest

from granite_storage.exceptions import ObjectExistsError
from tests.backends.test_s3_faults import SMALL, rig_put, rigged
from tests.faults.s3_proxy import Request
from tests.servers import S3Server


@pytest.fixture
def server(seaweedfs_server: S3Server) -> S3Server:
    """A server whose bucket is made where it may block."""
    assert seaweedfs_server.shared_bucket
    return seaweedfs_server


async def test_anothers_object_is_not_taken_for_ones_own(server: S3Server) -> None:
    async def taken(request: Request) -> None:
        await rig_put(request, SMALL)

    async with rigged(server) as rig:
        rig.proxy.on("PutObject", taken)
        with pytest.raises(ObjectExistsError):
            await rig.backend.put_bytes("a", SMALL)
        await rig.require_whole("a", SMALL)
