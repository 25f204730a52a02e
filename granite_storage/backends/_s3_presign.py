"""Requests that clients make of an S3 server by themselves, signed so that nothing of them can be changed."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

from granite_storage.backends._s3_client import S3Client
from granite_storage.backends.base import UploadRequest

__all__ = ["presigned_form", "presigned_put", "warn_of_early_end"]

logger = logging.getLogger("granite_storage")


async def presigned_form(
    client: S3Client, location: str, expires_in: int, content_type: str, min_size: int, max_size: int
) -> UploadRequest:
    """Return a form that stores an object: every condition of its policy names one value, but for the size.

    Source: Amazon S3 API reference, "Creating an HTML form (using AWS signature version 4)".
    """
    key = client.settings.key(location)
    form = await client.signer.generate_presigned_post(
        client.settings.bucket,
        key,
        Fields={"Content-Type": content_type},
        Conditions=[
            ["eq", "$key", key],
            ["eq", "$Content-Type", content_type],
            ["content-length-range", min_size, max_size],
        ],
        ExpiresIn=expires_in,
    )
    return UploadRequest("POST", form["url"], fields=form["fields"])


async def presigned_put(client: S3Client, location: str, expires_in: int, content_type: str, _: int, size: int) -> UploadRequest:
    """Return a PUT that stores an object of one size, which is signed as its Content-Length."""
    parameters = {"Bucket": client.settings.bucket, "Key": client.settings.key(location)}
    url = await client.signer.generate_presigned_url(
        "put_object", Params={**parameters, "ContentType": content_type, "ContentLength": size}, ExpiresIn=expires_in
    )
    return UploadRequest("PUT", url, headers={"Content-Type": content_type})


def warn_of_early_end(client: S3Client, expires_in: timedelta) -> None:
    """Log that what was just signed ends with the temporary credentials that signed it, once for each set of these."""
    end = client.end_of_credentials()
    if end is None or end == client.traits.warned_of_end:
        return
    left = end - datetime.now(UTC)
    if left < expires_in:
        client.traits.warned_of_end = end
        logger.warning(
            "what is presigned for bucket %r was asked to work for %s, but ends after %s with the temporary credentials that "
            "sign it: presign for less, or sign with credentials that last",
            client.settings.bucket,
            expires_in,
            timedelta(seconds=max(0, int(left.total_seconds()))),
        )
