"""A gallery that moves from its disk to a bucket still shows what is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gallery.support import until_stored, upload
from tests.gallery.test_command import started
from tests.servers import S3Server


@pytest.mark.case("RA-03")
async def test_a_gallery_that_is_given_a_bucket_keeps_its_files(tmp_path: Path, moto_server: S3Server) -> None:
    async with started(tmp_path, {}) as client:
        old = await upload(client, "old.txt", b"on the disk")
    async with moto_server.bucket() as bucket:
        environment = {
            "S3_BUCKET": bucket,
            "AWS_ENDPOINT_URL_S3": moto_server.endpoint_url,
            "AWS_ACCESS_KEY_ID": moto_server.session_kwargs["aws_access_key_id"],
            "AWS_SECRET_ACCESS_KEY": moto_server.session_kwargs["aws_secret_access_key"],
            "AWS_DEFAULT_REGION": moto_server.session_kwargs["region_name"],
        }
        async with started(tmp_path, environment) as client:
            new = await upload(client, "new.txt", b"in the bucket")
            for item, content in ((old, b"on the disk"), (new, b"in the bucket")):
                assert (await client.get(f"/files/{item['id']}")).content == content
            assert (await client.delete(f"/files/{old['id']}")).status_code == 204
            await until_stored(tmp_path)
