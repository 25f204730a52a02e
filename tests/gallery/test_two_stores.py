"""A gallery that moves from its disk to a bucket still shows what hangs there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gallery.test_command import started
from tests.servers import S3Server


@pytest.mark.case("RA-03")
async def test_a_gallery_that_is_given_a_bucket_keeps_its_files(tmp_path: Path, moto_server: S3Server) -> None:
    text = {"content-type": "text/plain"}
    async with started(tmp_path, {}) as client:
        old = (await client.post("/items", params={"name": "old.txt"}, content=b"on the disk", headers=text)).json()
    async with moto_server.bucket() as bucket:
        environment = {
            "S3_BUCKET": bucket,
            "AWS_ENDPOINT_URL_S3": moto_server.endpoint_url,
            "AWS_ACCESS_KEY_ID": moto_server.session_kwargs["aws_access_key_id"],
            "AWS_SECRET_ACCESS_KEY": moto_server.session_kwargs["aws_secret_access_key"],
            "AWS_DEFAULT_REGION": moto_server.session_kwargs["region_name"],
        }
        async with started(tmp_path, environment) as client:
            new = (await client.post("/items", params={"name": "new.txt"}, content=b"in the bucket", headers=text)).json()
            for item, content in ((old, b"on the disk"), (new, b"in the bucket")):
                assert (await client.get(f"/items/{item['id']}/file")).content == content
            assert (await client.delete(f"/items/{old['id']}")).status_code == 204
        assert not list((tmp_path / "data/files/gallery").rglob("*.txt"))
