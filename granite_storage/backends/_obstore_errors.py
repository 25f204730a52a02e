"""What went wrong in an object store, in the library's own words: the one place that reads obstore's errors.

obstore has a class for some of them. For the rest only its text tells what the service answered, and that quotes names of objects
and what the service said. So the text is read by its structure, never searched for words, and no message repeats it. obstore's
error is the `__cause__`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from granite_storage.backends._service_errors import PreconditionFailedError, RangeNotSatisfiableError
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageFullError,
)

__all__ = ["ObjectStoreConfigurationError", "translate"]


class ObjectStoreConfigurationError(ConfigurationError, BackendError):
    """The store cannot be used as it is configured: its bucket or container, or an ability that it lacks."""


_BY_CLASS: dict[str, type[BackendError]] = {
    "AlreadyExistsError": ObjectExistsError,
    "ConnectionError": BackendUnavailableError,
    "FileNotFoundError": ObjectNotFoundError,
    "NotFoundError": ObjectNotFoundError,
    "NotImplementedError": ObjectStoreConfigurationError,
    "NotSupportedError": ObjectStoreConfigurationError,
    "PermissionDeniedError": AccessDeniedError,
    "PermissionError": AccessDeniedError,
    "PreconditionError": PreconditionFailedError,
    "TimeoutError": BackendUnavailableError,
    "UnauthenticatedError": AccessDeniedError,
}
_BY_CODE: dict[str, type[BackendError]] = {
    **dict.fromkeys(
        ("NoSuchBucket", "ContainerNotFound", "PermanentRedirect", "AuthorizationHeaderMalformed"), ObjectStoreConfigurationError
    ),
    "RequestTimeTooSkewed": AccessDeniedError,
    **dict.fromkeys(("InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"), StorageFullError),
}
_BY_STATUS: dict[int, type[BackendError]] = {
    401: AccessDeniedError,
    403: AccessDeniedError,
    404: ObjectNotFoundError,
    408: BackendUnavailableError,
    412: PreconditionFailedError,
    416: RangeNotSatisfiableError,
    429: BackendUnavailableError,
    507: StorageFullError,
}
_BY_SYSTEM_ERROR: dict[int, type[BackendError]] = {
    1: AccessDeniedError,
    13: AccessDeniedError,
    20: ObjectNotFoundError,
    28: StorageFullError,
    30: AccessDeniedError,
    122: StorageFullError,
}
_CODE = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?<Error\b[^>]*>\s*<Code>(\w+)</Code>")
"""The code of an answer's body: the first element of it, so that no name of an object is taken for it."""

_DEBUG = "\n\nDebug source:\n"
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_URI = re.compile(r"\buri: Some\(\s*\S+\s*\)")
_STATUS = re.compile(r'\b(?:Status|Response) \{\s*status: (\d{3}),\s*body: (?:Some\(\s*)?(?:"(\d+)")?')
_NOT_DELETED = re.compile(r'\bDeleteFailed \{[^{}]*\bcode: "(\d+)"')
_SYSTEM_ERROR = re.compile(r"\bOs \{\s*code: (\d+)")
_NETWORK = re.compile(r"\b(?:HttpError|reqwest::Error|hyper::Error)\b")
_RANGE = re.compile(r"\b(?:InvalidRange|StartTooLarge|EndTooLarge|Inconsistent)\b")
_REDIRECT = re.compile(r"\bBareRedirect\b")

_SENT = r"Error performing [A-Z]+ \S+ in \S+?(?:, after \d+ retries, max_retries: \d+, retry_timeout: \S+ *)? - "
_SAID_STATUS = re.compile(r"(?:Server returned non-2xx )?status code: (\d{3})(?: [\w ]+)?(?:: (.*))?", re.DOTALL)
_SAID_ERROR = re.compile(r"Server returned error response: (.*)", re.DOTALL)
_SAID_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)\Z")


@dataclass(frozen=True, slots=True)
class _Facts:
    """What an error of obstore's tells, without anything that a caller or a server can put into its text.

    Attributes:
        status: The status of the service's answer.
        code: The code in the body of the answer.
        system: The number of the system's error.
        network: Whether there was no whole answer.
        range: Whether the range that was asked for is not in the object.
        redirect: Whether the service named another place.
    """

    status: int | None = None
    code: str | None = None
    system: int | None = None
    network: bool = False
    range: bool = False
    redirect: bool = False


def translate(error: Exception, operation: str, *, store: str, location: str | None = None, prefix: str = "") -> BackendError:
    """Return the error that callers see for one that obstore raised; it is to be raised from it.

    Args:
        error: obstore's error.
        operation: What was asked of it, such as `put`.
        store: What the store is called in messages.
        location: The object's location, where the request had one.
        prefix: What the store puts before locations.
    """
    facts = _facts_of(error, [f"{prefix}/{location}", location] if prefix and location else [location or ""])
    kind = _kind_of(error, facts)
    if kind is ObjectNotFoundError and operation == "put":  # an upload that is gone, or a file where a folder should be
        kind = BackendError
    target = store if location is None else f"{location!r} in {store}"
    reason = _REASONS.get(kind, f"failed: {type(error).__name__}")
    if facts.code == "RequestTimeTooSkewed":
        reason = "was refused: the clock of this machine differs too much from the server's; set it, by NTP for instance"
    return kind(f"{operation} of {target} {reason}", location=location)


_REASONS: dict[type[BackendError], str] = {
    AccessDeniedError: "was refused: the credentials do not allow it",
    BackendUnavailableError: "failed: the service did not answer, or not now",
    ObjectExistsError: "was refused: an object is there already",
    ObjectNotFoundError: "found no object",
    ObjectStoreConfigurationError: "cannot work: check the bucket or container and its region, or the store lacks the ability",
    StorageFullError: "failed: the store has no room left",
}


def _kind_of(error: Exception, facts: _Facts) -> type[BackendError]:
    if facts.code in _BY_CODE:
        return _BY_CODE[facts.code]
    named = next((_BY_CLASS[one.__name__] for one in type(error).__mro__ if one.__name__ in _BY_CLASS), None)
    if named is not None:
        return named
    if facts.redirect:
        return ObjectStoreConfigurationError
    if facts.status is not None:
        return _BY_STATUS.get(facts.status, BackendUnavailableError if facts.status >= 500 else BackendError)
    if facts.network:
        return BackendUnavailableError
    if facts.range:
        return RangeNotSatisfiableError
    return _BY_SYSTEM_ERROR.get(facts.system or 0, BackendError)


def _facts_of(error: Exception, paths: Sequence[str]) -> _Facts:
    """Read an error: by what Rust prints of its structure, or by its words where there is no more than those."""
    _, found, structure = str(error).rpartition(_DEBUG)
    return _facts_of_structure(structure) if found else _facts_of_words(structure, paths)


def _facts_of_structure(structure: str) -> _Facts:
    """Read what Rust prints of an error: what others wrote is in strings with escapes, or in addresses, which have no blank."""
    strings: list[str] = []

    def number(match: re.Match[str]) -> str:
        strings.append(match[1])
        return f'"{len(strings) - 1}"'

    bare = _URI.sub("", _STRING.sub(number, structure))
    status = _STATUS.search(bare)
    body = _unescaped(strings[int(status[2])]) if status and status[2] else ""
    failed = _NOT_DELETED.search(bare)
    reported = strings[int(failed[1])] if failed else ""
    system = _SYSTEM_ERROR.search(bare)
    return _Facts(
        status=int(status[1]) if status else int(reported) if reported.isdecimal() else None,
        code=_code_of(body) or (reported if not reported.isdecimal() else None),
        system=int(system[1]) if system else None,
        network=_NETWORK.search(bare) is not None,
        range=_RANGE.search(bare) is not None,
        redirect=_REDIRECT.search(bare) is not None,
    )


def _facts_of_words(words: str, paths: Sequence[str]) -> _Facts:
    """Read what obstore's writer raises, which is a text alone: from its beginning, word for word, past the object's own name."""
    path = "|".join(re.escape(path) for path in paths)
    about = rf"(?:Object at location|Request precondition failure for path|The operation lacked [a-z ]+ for path) (?:{path})"
    beginning = re.match(rf"(?:Generic \w+ error: |{about}[a-z ]*: |Error performing [a-z ]+: )*(?:{_SENT})?", words)
    rest = words[beginning.end() if beginning else 0 :]
    status = _SAID_STATUS.match(rest)
    body = _SAID_ERROR.match(rest)
    system = _SAID_SYSTEM_ERROR.search(rest)
    return _Facts(
        status=int(status[1]) if status else None,
        code=_code_of(status[2] or "" if status else body[1] if body else ""),
        system=int(system[1]) if system else None,
        network=rest.startswith("HTTP error: "),
        redirect=rest.startswith("Received redirect without LOCATION"),
    )


def _code_of(body: str) -> str | None:
    code = _CODE.match(body.removeprefix("\ufeff"))
    return code[1] if code else None


def _unescaped(text: str) -> str:
    """Undo as much of Rust's escapes as the beginning of an answer has."""
    return text.replace('\\"', '"').replace("\\r", "\r").replace("\\n", "\n").replace("\\t", "\t").replace("\\u{feff}", "\ufeff")
