"""Finding out, once for a backend, whether its server looks at the condition of the request that ends a multipart upload.

A server that refuses a header says so. One that does not know it stores all the same: Ceph 16 ignores `If-None-Match: *` of a
CompleteMultipartUpload, and would write over an object. So a HEAD precedes the end of a multipart upload until the server has
shown on an object made for that purpose that it looks at the condition, and where it does not, ever after.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from granite_storage._tasks import finish
from granite_storage.backends._s3_body import Body
from granite_storage.backends._s3_client import S3Client
from granite_storage.backends._s3_multipart import checksum_header
from granite_storage.backends._service_errors import PreconditionFailedError
from granite_storage.exceptions import AccessDeniedError, BackendError, BackendUnavailableError
from granite_storage.locations import RESERVED_PREFIX

__all__ = ["PROBE_PREFIX", "find_out", "remove_probes"]

logger = logging.getLogger("granite_storage")

PROBE_PREFIX = f"{RESERVED_PREFIX}probe-"
"""How the locations of objects begin that are made to find something out; they are in no listing."""

_KNOWN_SERVERS = ("AmazonS3",)
"""The names of servers that are known to look at the conditions of every write."""


async def find_out(client: S3Client, answer: Mapping[str, Any]) -> None:
    """Find out what the server does with the condition of a CompleteMultipartUpload, unless that is known.

    Args:
        client: The event loop's client.
        answer: The answer to such a request, by whose headers some servers are known.
    """
    traits = client.traits
    if traits.checks_completions is not None or traits.asking:
        return
    if answer["ResponseMetadata"].get("HTTPHeaders", {}).get("server", "") in _KNOWN_SERVERS:
        traits.checks_completions = True
        return
    traits.asking = True
    try:
        await finish(_ask(client), f"finding out whether the S3 server of bucket {traits.bucket!r} looks at conditions")
    finally:
        traits.asking = False


async def remove_probes(client: S3Client, before: datetime) -> int:
    """Remove the objects that a crash left of this, if they are from before a time; return how many."""
    answer = await client.call("list_objects_v2", Prefix=client.settings.key(PROBE_PREFIX))
    old = [entry["Key"] for entry in answer.get("Contents", ()) if entry["LastModified"] < before]
    for key in old:
        await client.call("delete_object", Key=key)
    return len(old)


async def _ask(client: S3Client) -> None:
    traits = client.traits
    try:
        traits.checks_completions = await _checks_completions(client)
    except BackendUnavailableError:
        return  # the next multipart upload asks again
    except BackendError as error:
        traits.checks_completions = False
        logger.warning(
            "it could not be found out whether the S3 server of bucket %r looks at If-None-Match of CompleteMultipartUpload "
            "(%s): the backend looks for an object before the end of each multipart upload and copy; conditional_writes=True "
            "says that the server does",
            traits.bucket,
            error,
        )
        return
    if not traits.checks_completions:
        logger.warning(
            "the S3 server of bucket %r ignores If-None-Match of CompleteMultipartUpload: the backend looks for an object "
            "before the end of each multipart upload and copy, and of two writers of one location at the same moment the later "
            "one wins; conditional_writes=False says that this is known",
            traits.bucket,
        )


async def _checks_completions(client: S3Client) -> bool:
    """Upload onto an object made for this, on the condition that there is none; return whether the server refuses."""
    key = client.settings.key(f"{PROBE_PREFIX}{uuid.uuid4().hex}")
    made: list[dict[str, Any]] = []
    upload_id: str | None = None
    content = Body([b"probe"])
    header, _ = await checksum_header(content, sha256=client.settings.checksums)
    try:
        made.append(await client.call("put_object", Key=key, Body=content, **header, **_extra(client, "put_object")))
        upload_id = (await client.call("create_multipart_upload", Key=key, **_extra(client, "create_multipart_upload")))[
            "UploadId"
        ]
        part = await client.call("upload_part", Key=key, UploadId=upload_id, PartNumber=1, Body=content, **header)
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        request: dict[str, Any] = {"Key": key, "UploadId": upload_id, "MultipartUpload": parts, "IfNoneMatch": "*"}
        made.append(await client.call("complete_multipart_upload", **request))
    except PreconditionFailedError:
        return True
    else:
        upload_id = None
        return False
    finally:
        await finish(_remove(client, key, upload_id, made), f"removing the probe {key!r}")


def _extra(client: S3Client, operation: str) -> dict[str, Any]:
    """Return what the bucket may demand of every write, such as encryption; no lock, which would keep the probe."""
    given = client.settings.extra_put_kwargs.items()
    return {name: value for name, value in given if client.supports(operation, name) and not name.startswith("ObjectLock")}


async def _remove(client: S3Client, key: str, upload_id: str | None, made: list[dict[str, Any]]) -> None:
    if upload_id is not None:
        await client.call("abort_multipart_upload", Key=key, UploadId=upload_id)
    for version in {answer.get("VersionId") for answer in made}:
        named = {"VersionId": version} if version and version != "null" else {}
        try:
            await client.call("delete_object", Key=key, **named)
        except AccessDeniedError:  # a version needs a permission of its own
            await client.call("delete_object", Key=key)
