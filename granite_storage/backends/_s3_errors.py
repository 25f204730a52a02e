"""Converts the errors of the S3 SDK to the library's; no other module reads the SDK's errors.

No message repeats what the server or the SDK said: it may quote a key or a token. Their error is the `__cause__`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from granite_storage._documentation import Page
from granite_storage.backends._remote import BY_STATUS, PreconditionFailedError, RangeNotSatisfiableError
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    ObjectNotFoundError,
    StorageError,
    StorageFullError,
)


class S3ConfigurationError(ConfigurationError, BackendError):
    """The server cannot be used as it is configured: the bucket, its region or an ability that the server lacks."""

    _page = Page.S3


class ExpiredCredentialsError(AccessDeniedError):
    """The credentials have expired."""


class ConflictError(BackendUnavailableError):
    """Another operation on the same key was in progress; nothing was changed."""


class MissingUploadError(BackendError):
    """The multipart upload is not known: it was completed or aborted."""


_BY_CODE: dict[str, type[BackendError]] = {
    **dict.fromkeys(("NoSuchKey", "NoSuchVersion", "NotFound"), ObjectNotFoundError),
    **dict.fromkeys(("ConditionalRequestConflict", "OperationAborted"), ConflictError),
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"), ExpiredCredentialsError),
    **dict.fromkeys(("AccessDenied", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"), AccessDeniedError),
    **dict.fromkeys(("InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"), StorageFullError),
    **dict.fromkeys(
        ("BadDigest", "IncompleteBody", "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling"),
        BackendUnavailableError,
    ),
    "InvalidRange": RangeNotSatisfiableError,
    "NoSuchUpload": MissingUploadError,
    "PreconditionFailed": PreconditionFailedError,
}
_BY_STATUS = BY_STATUS | dict.fromkeys((500, 502, 503, 504), BackendUnavailableError) | {409: ConflictError}
_MOST_SKEW = timedelta(minutes=15)
"""How far S3 lets a request's date be from its own clock."""

_WRONG_REGION = frozenset({"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"})
_WRITES = frozenset({"complete_multipart_upload", "copy_object", "create_multipart_upload", "put_object", "upload_part"})
_SWITCHES = (
    "conditional_writes=False if it does not know If-None-Match (the backend then checks for an existing object before each "
    "write), or checksums=False if it does not know x-amz-checksum-sha256 (the backend then sends Content-MD5)"
)


def translate(error: Exception, operation: str, *, bucket: str, location: str | None = None) -> StorageError:
    """Return the error that callers see for one that the SDK raised; it is to be raised from it.

    Args:
        error: The SDK's error.
        operation: What was asked of it, such as `put_object`.
        bucket: The bucket's name.
        location: The object's location, where the request had one.
    """
    from botocore import exceptions as sdk

    target = _target(bucket, location)
    if isinstance(error, sdk.ClientError):
        return translate_response(error.response, operation, bucket=bucket, location=location)
    if isinstance(error, (sdk.NoCredentialsError, sdk.PartialCredentialsError, sdk.CredentialRetrievalError)):
        return AccessDeniedError(
            f"no usable credentials were found for {target}: configure them in the environment, or pass a session",
            location=location,
        )
    network = (sdk.HTTPClientError, sdk.ConnectionError, sdk.IncompleteReadError, OSError, TimeoutError)
    if isinstance(error, network) or type(error).__module__.partition(".")[0] == "aiohttp":
        message = f"the S3 server did not answer {operation} of {target}: {type(error).__name__}"
        return BackendUnavailableError(message, location=location)
    if operation == "open" and isinstance(error, (sdk.BotoCoreError, TypeError, ValueError)):
        message = f"the SDK cannot make a client for {target} with this endpoint_url, region_name, client_kwargs and config"
        return S3ConfigurationError(f"{message}: {type(error).__name__}")
    if isinstance(error, sdk.BotoCoreError):
        message = f"the SDK cannot call {operation} for {target} with this configuration: {type(error).__name__}"
        return S3ConfigurationError(message, location=location)
    return BackendError(f"{operation} of {target} failed: {type(error).__name__}", location=location)


def translate_response(response: Mapping[str, Any], operation: str, *, bucket: str, location: str | None = None) -> BackendError:
    """Return the error for a response that reports a failure.

    Args:
        response: What the SDK made of the answer; its `Error` has the `Code`.
        operation: What was asked, such as `put_object`.
        bucket: The bucket's name.
        location: The object's location, where the request had one.
    """
    details = response.get("Error", {})
    code = str(details.get("Code", ""))
    metadata = response.get("ResponseMetadata", {})
    status = int(metadata.get("HTTPStatusCode", 0))
    answer = f"{status} {code}" if status and code != str(status) else code
    wrong = _misconfigured(code, status, details, metadata.get("HTTPHeaders", {}), operation, bucket)
    if wrong:
        return S3ConfigurationError(f"{wrong} ({operation} was answered {answer})", location=location)
    skew = _clock_skew(code, status, metadata.get("HTTPHeaders", {}))
    if skew:
        return AccessDeniedError(f"{operation} of {_target(bucket, location)} was answered {answer}: {skew}", location=location)
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status, BackendError)
    return kind(f"{operation} of {_target(bucket, location)} was answered {answer}", location=location)


def _clock_skew(code: str, status: int, headers: Mapping[str, str]) -> str | None:
    """Return what is wrong with this machine's clock where that can be why a signature was refused."""
    ahead = None
    with suppress(KeyError, TypeError, ValueError):
        ahead = datetime.now(UTC) - parsedate_to_datetime(headers["date"]).astimezone(UTC)
    skewed = status == 403 and ahead is not None and abs(ahead) > _MOST_SKEW
    if code != "RequestTimeTooSkewed" and not skewed:
        return None
    by = "" if ahead is None else f" by {abs(ahead.total_seconds()):.0f} s, {'ahead' if ahead > timedelta(0) else 'behind'}"
    return f"the clock of this machine differs from the server's{by}: set it, for instance by NTP"


def _target(bucket: str, location: str | None) -> str:
    return f"bucket {bucket!r}" if location is None else f"{location!r} in bucket {bucket!r}"


def _misconfigured(
    code: str, status: int, details: Mapping[str, Any], headers: Mapping[str, str], operation: str, bucket: str
) -> str | None:
    """Return what is to be changed in the configuration, None if the error has other causes."""
    if code in {"InvalidBucketName", "NoSuchBucket"}:
        return f"there is no bucket {bucket!r}: check the name, the endpoint_url and the region_name"
    if code in _WRONG_REGION or status in {301, 307, 308}:
        region = details.get("Region") or headers.get("x-amz-bucket-region")
        where = f"lives in region {region!r}" if region else "lives in another region or at another endpoint"
        return f"bucket {bucket!r} {where}: pass the matching region_name and endpoint_url"
    if operation in _WRITES and _lacks_ability(code, status, details):
        return f"the server does not implement what the write needs: pass {_SWITCHES}"
    return None


def _lacks_ability(code: str, status: int, details: Mapping[str, Any]) -> bool:
    if status == 501 or code == "NotImplemented":
        return True
    said = " ".join(str(details.get(key, "")) for key in ("Message", "Header", "ArgumentName")).lower()
    return status == 400 and code != "BadDigest" and ("if-none-match" in said or "x-amz-checksum" in said)
