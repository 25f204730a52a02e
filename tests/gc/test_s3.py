"""Collecting from a real bucket, by its server's clock, with unfinished multipart uploads."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from tests.gc.environment import Crate, file, gc_environment
from tests.orm.databases import Database
from tests.servers import S3Server


@pytest.mark.case("GCX-10")
async def test_a_bucket(plain_database: Database, seaweedfs_server: S3Server) -> None:
    async with seaweedfs_server.bucket() as bucket:
        backend = seaweedfs_server.backend(bucket, prefix="tenant")
        async with gc_environment(plain_database, backend=backend) as env:
            await env.add(*(Crate(id=number, file=file(f"{number}")) for number in range(1, 4)))
            kept = await env.locations()
            orphans = {(await env.orphan()).location for _ in range(2)}
            async with backend.client() as client:
                begun = await client.create_multipart_upload(Bucket=bucket, Key="tenant/docs/begun")
                part = {"Bucket": bucket, "Key": "tenant/docs/begun", "UploadId": begun["UploadId"], "PartNumber": 1}
                await client.upload_part(**part, Body=b"part")
            report = await env.collect()
            assert (report.scanned, report.referenced, report.within_grace_period, report.deleted, report.unfinished) == (
                5,
                3,
                2,
                0,
                0,
            )
            await asyncio.sleep(3)  # the server tells times in whole seconds
            report = await env.collector(grace_period=timedelta(seconds=1)).collect(storage_key="docs", dry_run=False)
            assert (report.orphaned, report.deleted, report.failures, report.unfinished) == (2, 2, [], 1)
            assert await env.locations() == kept
            assert not orphans & kept
            async with backend.client() as client:
                assert "Uploads" not in await client.list_multipart_uploads(Bucket=bucket)
