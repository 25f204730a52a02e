"""Requests that clients make of an S3 server by themselves, signed so that nothing of them can be changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from granite_storage.backends._s3_client import S3Client, S3Settings
from granite_storage.backends._s3_errors import S3ConfigurationError
from granite_storage.backends.base import UploadRequest

__all__ = ["presigned_form", "presigned_put", "require_presignable", "warn_of_early_end"]

logger = logging.getLogger("granite_storage")

_HEADERS = {
    "ACL": "x-amz-acl",
    "BucketKeyEnabled": "x-amz-server-side-encryption-bucket-key-enabled",
    "SSEKMSEncryptionContext": "x-amz-server-side-encryption-context",
    "SSEKMSKeyId": "x-amz-server-side-encryption-aws-kms-key-id",
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "StorageClass": "x-amz-storage-class",
}
"""The parameters that decide how the bytes are kept; the others are for the copy that is made of what a client has stored."""

_FIELDS = _HEADERS | {"ACL": "acl"}
_ARCHIVES = ("GLACIER", "DEEP_ARCHIVE")


def require_presignable(settings: S3Settings) -> None:
    """Refuse the parameters with which no client can store, or nothing could be made of what it has stored.

    Raises:
        S3ConfigurationError: There are some.
    """
    extra = settings.extra_put_kwargs
    if any(name.startswith("SSECustomer") for name in extra):
        raise S3ConfigurationError("extra_put_kwargs encrypts with a key of your own, which a client would have to be given")
    if extra.get("StorageClass") in _ARCHIVES:
        raise S3ConfigurationError(
            f"extra_put_kwargs has the storage class {extra['StorageClass']!r}, from which no direct upload could be read"
        )


async def presigned_form(
    client: S3Client, location: str, expires_in: int, content_type: str, min_size: int, max_size: int
) -> UploadRequest:
    """Return a form that stores an object: every condition of its policy names one value, but for the size.

    Source: Amazon S3 API reference, "Creating an HTML form (using AWS signature version 4)".
    """
    key = client.settings.key(location)
    fields = {"Content-Type": content_type, **_named(client.settings.extra_put_kwargs, _FIELDS)}
    form = await client.signer.generate_presigned_post(
        client.settings.bucket,
        key,
        Fields=dict(fields),
        Conditions=[
            ["eq", "$key", key],
            *(["eq", f"${name}", value] for name, value in fields.items()),
            ["content-length-range", min_size, max_size],
        ],
        ExpiresIn=expires_in,
    )
    return UploadRequest("POST", form["url"], fields=form["fields"])


async def presigned_put(client: S3Client, location: str, expires_in: int, content_type: str, _: int, size: int) -> UploadRequest:
    """Return a PUT that stores an object of one size, which is signed as its Content-Length."""
    extra = client.settings.extra_put_kwargs
    parameters = {
        **{name: extra[name] for name in _HEADERS if name in extra},
        "Bucket": client.settings.bucket,
        "Key": client.settings.key(location),
        "ContentType": content_type,
        "ContentLength": size,
    }
    url = await client.signer.generate_presigned_url("put_object", Params=parameters, ExpiresIn=expires_in)
    return UploadRequest("PUT", url, headers={"Content-Type": content_type, **_named(extra, _HEADERS)})


def _named(extra: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Return parameters of the SDK as a client sends them."""
    values = {name: extra[parameter] for parameter, name in names.items() if parameter in extra}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}


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
