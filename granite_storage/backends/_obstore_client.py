"""The store behind an `ObjectStoreBackend`: which one it is, what it can do, and every call to it with its errors translated."""

from __future__ import annotations

import asyncio
import atexit
import os
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from granite_storage._documentation import Page
from granite_storage._tasks import shielded, shielded_cleanup
from granite_storage.backends._identity import bucket_place, folder_places, web_place
from granite_storage.backends._remote import BY_STATUS, Opened, PreconditionFailedError, RangeNotSatisfiableError
from granite_storage.backends.base import ByteRange, ObjectInfo, Place
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageFullError,
)

T = TypeVar("T")

OWNER = "granitewriteid"
"""The metadata entry that tells which write an object is of; a name that is good on S3, Google and Azure alike."""

CANCEL_TIMEOUT = 1.0
"""How long a cancelled caller waits for the answer that it will not hear of, in seconds."""

_CHUNK = 1 << 19  # what comes is up to half as much more: not over the 1 MiB that readers ask for, so that it is never cut
_DELETES = 3
_LARGEST = (1 << 63) - 1
_LAST_WAIT = 1.0


# The errors of obstore, translated.
#
# obstore has a class for some of them. For the rest only its text tells what the service answered, and that quotes names of
# objects and what the service said. So the text is read by its structure, never searched for words, and no message repeats
# it. obstore's error is the `__cause__`.


class ObjectStoreConfigurationError(ConfigurationError, BackendError):
    """The store cannot be used as it is configured: its bucket or container, or an ability that it lacks."""

    _page = Page.OBSTORE


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
    """What an error of obstore says, without any text that a caller or a server controls.

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
    BackendUnavailableError: "failed: the service did not answer, or is unavailable at the moment",
    ObjectExistsError: "was refused: an object already exists",
    ObjectNotFoundError: "found no object",
    ObjectStoreConfigurationError: "cannot succeed: check the bucket or container, its region, and the abilities of the store",
    StorageFullError: "failed: the store is full",
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
        return BY_STATUS.get(facts.status, BackendUnavailableError if facts.status >= 500 else BackendError)
    if facts.network:
        return BackendUnavailableError
    if facts.range:
        return RangeNotSatisfiableError
    return _BY_SYSTEM_ERROR.get(facts.system or 0, BackendError)


def _facts_of(error: Exception, paths: Sequence[str]) -> _Facts:
    """Parse an error: Rust's debug output of its structure, or its text if there is nothing else."""
    _, found, structure = str(error).rpartition(_DEBUG)
    return _facts_of_structure(structure) if found else _facts_of_words(structure, paths)


def _facts_of_structure(structure: str) -> _Facts:
    """Parse Rust's debug output of an error: foreign text is in escaped strings, or in URLs, which have no spaces."""
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
    """Parse an error of obstore's writer, which is only text: match it from its beginning, past the object's name."""
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


# The kinds of stores, and how one is made from a URL.


_DEFAULT_CLIENT_OPTIONS: dict[str, Any] = {
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=60),
    "timeout": timedelta(hours=1),  # obstore's own 30 s are for the whole of a body, however large
}
_DEFAULT_RETRY_CONFIG: dict[str, Any] = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}

# What obstore calls options of the HTTP client; in the config of a store they make it panic.
_CLIENT_OPTIONS = frozenset(
    {
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "default_content_type",
        "default_headers",
        "http1_only",
        "http2_keep_alive_interval",
        "http2_keep_alive_timeout",
        "http2_keep_alive_while_idle",
        "http2_max_frame_size",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_ca_certificate",
        "proxy_excludes",
        "proxy_url",
        "randomize_addresses",
        "read_timeout",
        "root_certificate",
        "timeout",
        "user_agent",
    }
)
_PREFIX = re.compile(r"^(?:aws|azure|google)_")


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of a kind of store.

    Attributes:
        name: What messages call it.
        over_network: Whether it has connections, options for them, and answers that can be lost.
        keeps_attributes: Whether an object keeps a content type and metadata.
        writes: Whether objects can be created in it.
        copies_exclusively: Whether a copy can be made on the condition that its target is absent.
        signs: Whether it signs URLs.
        signs_plain_names_only: Whether obstore's signature is wrong for a location that is escaped in a URL.
        deletes_in_batches: Whether many objects are deleted by one request.
        mistakes_parts: Whether it takes parts that were never joined for an object, and refuses to create one.
        names_temporary_files: Whether an object's name must leave room for that of a temporary file.
        has_bucket: Whether objects are in a bucket or container, which must be there.
        lists_in_order: Whether its listings are in byte order, and may begin after a location; None where that depends.
    """

    name: str
    over_network: bool = True
    keeps_attributes: bool = True
    writes: bool = True
    copies_exclusively: bool = True
    signs: bool = False
    signs_plain_names_only: bool = False
    deletes_in_batches: bool = False
    mistakes_parts: bool = False
    names_temporary_files: bool = False
    has_bucket: bool = True
    lists_in_order: bool | None = None


KINDS = {
    "S3Store": Kind("S3", copies_exclusively=False, signs=True, deletes_in_batches=True),
    "GCSStore": Kind("Google Cloud Storage", signs=True, lists_in_order=True),
    "AzureStore": Kind("Azure", signs=True, signs_plain_names_only=True, deletes_in_batches=True, mistakes_parts=True),
    "HTTPStore": Kind("HTTP", keeps_attributes=False, writes=False, has_bucket=False, lists_in_order=False),
    "LocalStore": Kind(
        "local disk",
        over_network=False,
        keeps_attributes=False,
        names_temporary_files=True,
        has_bucket=False,
        lists_in_order=False,
    ),
    "MemoryStore": Kind("memory", over_network=False, has_bucket=False, lists_in_order=True),
}
_LOCAL_SCHEMES = ("file", "memory")
_NO_SUCH_FOLDER = ".granite-no-such-folder"
_SAYS_NOTHING = frozenset({"delete", "sign"})
"""Operations that succeed also where there is no bucket."""

_process_of_threads: int | None = None
"""The process that has obstore's threads: the one that first asked it for something. A fork leaves them behind."""
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
"""The variables in which obstore finds the server where its options have none."""


def plain_name(store: Any) -> str:
    """Return what a store is called in messages and in repr: no user, password, query or option of it."""
    if not isinstance(store, str):
        return type(store).__name__
    parts = urlsplit(store)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def make_client(store: Any, options: Mapping[str, Any]) -> StoreClient:
    """Return the client for a store that was passed in ready-made, or that a URL and options describe.

    Raises:
        ConfigurationError: No store can be made of it.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(store, str):
        return StoreClient(plain_name(store), _builder(store, given))
    if given:
        raise ConfigurationError(f"{', '.join(given)} can be passed only with a URL: a ready-made store has its own")
    return StoreClient(plain_name(store), lambda: store, ours=False)


def _builder(url: str, given: dict[str, Any]) -> Callable[[], Any]:
    if urlsplit(url).scheme in _LOCAL_SCHEMES:
        if given:
            raise ConfigurationError(f"{', '.join(given)} cannot be passed with {plain_name(url)!r}, which has no connections")
    else:
        given["client_options"] = {**_DEFAULT_CLIENT_OPTIONS, **given.get("client_options", {})}
        given["retry_config"] = {**_DEFAULT_RETRY_CONFIG, **given.get("retry_config", {})}
        unknown = given["retry_config"].keys() - _DEFAULT_RETRY_CONFIG.keys()
        if unknown:  # obstore would ignore it
            raise ConfigurationError(
                f"retry_config takes {', '.join(sorted(_DEFAULT_RETRY_CONFIG))}, but not {', '.join(sorted(unknown))}"
            )
        _require_options_of_store(given.get("config", {}))

    def build() -> Any:
        from obstore.store import from_url

        try:
            return from_url(url, **given)
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            message = f"obstore cannot make a store from {plain_name(url)!r} with this config, client_options and retry_config"
            raise ConfigurationError(f"{message}: {type(error).__name__}") from error

    return build


def _require_options_of_store(config: Mapping[str, Any]) -> None:
    """Refuse options of the HTTP client among those of the store, by their names: the values may be secrets."""
    misplaced = {key: _PREFIX.sub("", key.lower()) for key in config if isinstance(key, str)}
    misplaced = {key: name for key, name in misplaced.items() if name in _CLIENT_OPTIONS}
    if misplaced:
        raise ConfigurationError(
            f"config has {', '.join(sorted(misplaced))}, which are options of the HTTP client, not of the store: pass"
            f" client_options={{{', '.join(f'{name!r}: ...' for name in sorted(misplaced.values()))}}}"
        )


class StoreClient:
    """Makes each call of a store, and translates its errors; readers ask it, see `Service`.

    A store is bound to no event loop. One that was built from a URL is built again after it was closed.

    Attributes:
        attempts: See `Service.attempts`.
        kind: What is known of the store.
        name: What messages call it.
        prefix: What the store puts before every location.
        bucket_seen: Whether an answer has shown that the bucket is there, or it need not be.
    """

    attempts = 5

    def __init__(self, name: str, build: Callable[[], Any], *, ours: bool = True) -> None:
        self.name = name
        self._build = build
        self._store: Any = build()
        kind = next((KINDS[one.__name__] for one in type(self._store).__mro__ if one.__name__ in KINDS), None)
        if kind is None:
            raise ConfigurationError(f"store must be a URL or a store of obstore.store, not {type(self._store).__name__}")
        self.kind = kind
        self._closes = ours and kind.over_network
        self.prefix = str(getattr(self._store, "prefix", None) or "") if kind.over_network else ""
        config: Mapping[str, Any] = getattr(self._store, "config", {})
        conditional = str(config.get("copy_if_not_exists", config.get("aws_copy_if_not_exists", "")))
        self.copies_exclusively = kind.copies_exclusively or conditional.startswith("header")
        self.bucket_seen = not kind.has_bucket

    async def store(self) -> Any:
        """Return the store; one that was closed is built again, in a thread, because that reads certificates.

        Raises:
            ObjectStoreConfigurationError: obstore was used in the process that this one was forked from.
        """
        _require_threads_of_obstore()
        if self._store is None:
            self._store = await shielded(asyncio.to_thread(self._build))
        return self._store

    async def places(self) -> frozenset[Place]:
        """Return the names of the place that the store leads to."""
        store = await self.store()
        match self.kind.name:
            case "memory":
                return frozenset({Place(f"memory {id(store)}")})
            case "local disk":
                return await shielded(asyncio.to_thread(folder_places, Path(store.prefix or "/")))
            case "HTTP":
                return frozenset({web_place(store.url)})
            case "S3":
                endpoint = store.config.get("endpoint") or next(filter(None, map(os.environ.get, _ENDPOINTS)), None)
                return frozenset({bucket_place("s3", endpoint, store.config.get("bucket", ""), self.prefix)})
            case "Azure":
                account, container = store.config.get("account_name", ""), store.config.get("container_name", "")
                return frozenset({bucket_place(f"azure {account}", store.config.get("endpoint"), container, self.prefix)})
            case _:
                return frozenset({bucket_place("google", None, store.config.get("bucket", ""), self.prefix)})

    def close(self) -> None:
        """Drop a store that was made here: its idle connections close with it, and calls in progress keep theirs."""
        if self._closes:
            self._store = None

    async def call(self, operation: str, location: str | None, request: Callable[[Any], Awaitable[T]]) -> T:
        """Make one call of the store, which a cancellation does not cut off at once; see `wait_for_answer`.

        Args:
            operation: What it is called in messages.
            location: The object's location, where it has one.
            request: Makes the call of a store.

        Raises:
            BackendError: The store's error, translated.
        """
        return await wait_for_answer(self.make(operation, location, request))

    async def make(self, operation: str, location: str | None, request: Callable[[Any], Awaitable[T]]) -> T:
        """Make one call of the store in a task that is not cancelled before the answer is there; other callers use `call`."""
        store = await self.store()
        try:
            answer = await request(store)
        except Exception as error:  # noqa: BLE001  # translate tells what it is
            # obstore holds it until its next call, and its traceback would hold the store with its connections
            problem = self.translated(error, operation, location)
            problem.__cause__ = error.with_traceback(None)
        else:
            if operation not in _SAYS_NOTHING:
                self.bucket_seen = True
            return answer
        try:
            if isinstance(problem, ObjectNotFoundError):
                await self.require_bucket()
            raise problem
        finally:
            del problem  # otherwise its traceback would keep this frame alive, and with it the store

    def translated(self, error: Exception, operation: str, location: str | None) -> BackendError:
        """Return the error that callers see for one of the store's."""
        return translate(error, operation, store=self.name, location=location, prefix=self.prefix)

    async def require_bucket(self) -> None:
        """Raise `ObjectStoreConfigurationError` where there is no bucket: many answers do not tell that from a missing object.

        It is asked once; a bucket that may not be listed is taken to be there.
        """
        if self.bucket_seen:
            return
        store = await self.store()
        try:
            await store.list_with_delimiter_async(_NO_SUCH_FOLDER)
        except Exception as error:  # noqa: BLE001  # translate tells what it is
            problem = self.translated(error, "list", None)
            if isinstance(problem, ObjectStoreConfigurationError | ObjectNotFoundError):
                message = f"{self.name} does not exist: check the bucket or container, its region and the endpoint"
                raise ObjectStoreConfigurationError(message) from error.with_traceback(None)
            if isinstance(problem, BackendUnavailableError):
                return
        self.bucket_seen = True

    async def get(self, location: str, start: int, stop: int | None, same: Mapping[str, Any] | None = None, /) -> Opened:
        """Ask for a range; see `Service.get`."""
        options = dict(same or {})
        if start or stop is not None:
            options["range"] = (start, _LARGEST if stop is None else min(stop, _LARGEST))
        opened, _ = await self._ask(location, options, "get")
        return opened

    async def head(self, location: str, /) -> ObjectInfo:
        """Ask what is known of an object; see `Service.head`."""
        info, _ = await self.find(location)
        return info

    async def find(self, location: str) -> tuple[ObjectInfo, str | None]:
        """Return the properties of an object, and the id of the write that it is of, where it has one."""
        found, write_id = await self._ask(location, {"head": True}, "head")
        return found.info, write_id

    async def _ask(self, location: str, options: Mapping[str, Any], operation: str) -> tuple[Opened, str | None]:
        async def request(store: Any) -> tuple[Opened, str | None]:
            return _opened(location, await store.get_async(location, options=options))

        return await self.call(operation, location, request)

    async def exists(self, location: str) -> bool:
        """Return whether an object is there."""
        try:
            await self.call("head", location, lambda store: store.head_async(location))
        except ObjectNotFoundError:
            return False
        return True

    async def delete(self, location: str) -> None:
        """Remove an object; a missing object is not an error."""
        for attempt in range(1, _DELETES + 1):
            try:
                await self.call("delete", location, lambda store: store.delete_async(location))
                await wait_for_answer(self.require_bucket())
            except ObjectNotFoundError:  # some stores say so
                return
            except BackendUnavailableError:  # its answer may be lost, and obstore asks again for what only reads
                if attempt == _DELETES:
                    raise
            except BackendError:  # a folder of a local disk is not an object, but is refused in other words
                if self.kind.over_network or await self.exists(location):
                    raise
                return
            else:
                return

    async def signed(self, location: str, expires_in: timedelta) -> str:
        """Return a URL for a GET."""
        from obstore import sign_async

        url = await self.call("sign", location, lambda store: sign_async(store, "GET", location, expires_in))
        if self.kind.signs_plain_names_only and "%" in urlsplit(url).path:
            message = f"obstore cannot sign a URL for {location!r} on {self.kind.name}: it has a character that URLs escape"
            raise ObjectStoreConfigurationError(message, location=location)
        return url


def _opened(location: str, result: Any) -> tuple[Opened, str | None]:
    """Return what an object store has sent of an object, and the id of the write that it is of, where it has one.

    obstore holds what its future resolved to until its next call, whenever that is. So nothing may stay in it that is open: the
    body is taken out as soon as there is an answer, also where no caller waits for it any more.
    """
    meta, attributes = result.meta, result.attributes
    sent = ByteRange(*result.range)
    body = _StreamBody(location, result.stream(min_chunk_size=_CHUNK), sent.stop - sent.start)
    same = {"if_match": meta["e_tag"]} if meta["e_tag"] else {}
    return Opened(info_of(location, meta, attributes), sent, body, same), attributes.get(OWNER)


class _StreamBody:
    """The chunks of a stream of obstore's, each asked for when the one before it has been handed on, not when it is wanted.

    So obstore puts a chunk together while the one before it is used. What it was asked for is kept here until it is taken or the
    body is closed: in obstore's future it would be lost with a read that is cancelled.
    """

    def __init__(self, location: str, stream: Any, size: int) -> None:
        self._location = location
        self._stream: Any = stream
        self._left = size
        self._rest = memoryview(b"")
        self._coming: asyncio.Future[bytes] | None = None

    async def read(self, size: int, /) -> bytes:
        if not self._rest:
            chunk = await self._next_chunk()
            if len(chunk) <= size:
                self._ask_ahead()
                return bytes(chunk)  # the same object where it is bytes, as what comes over a network is
            self._rest = memoryview(chunk)
        piece, self._rest = self._rest[:size], self._rest[size:]
        if not self._rest:
            self._ask_ahead()
        return bytes(piece)

    async def aclose(self) -> None:
        """Wait for what was asked for, at most a second: one that is still to come when the program ends could abort it."""
        coming, self._coming, self._stream = self._coming, None, None
        if coming is None:
            return
        try:
            if not coming.done():
                await shielded_cleanup(asyncio.wait([coming], timeout=CANCEL_TIMEOUT), f"closing a reader of {self._location!r}")
        finally:
            if not coming.cancel() and not coming.cancelled():
                coming.exception()  # no other code retrieves it

    async def _next_chunk(self) -> bytes:
        coming = self._coming or self._stream.__anext__()
        self._coming = coming
        try:
            chunk: bytes = await asyncio.shield(coming)
        except StopAsyncIteration:
            chunk = b""
        self._coming = None
        self._left -= len(chunk)
        if self._left < 0:
            raise BackendError(f"the service sent more bytes of {self._location!r} than were requested", location=self._location)
        return chunk

    def _ask_ahead(self) -> None:
        if self._left:
            self._coming = self._stream.__anext__()


async def wait_for_answer(request: Awaitable[T]) -> T:
    """Await an answer of obstore's; a cancelled caller waits for it, at most a second.

    An answer that has come when its await is cancelled would be lost in obstore's future, with the file or connection that it
    holds; and one that is still to come when the program ends could abort it.
    """
    return await shielded(request, timeout=CANCEL_TIMEOUT)


def _require_threads_of_obstore() -> None:
    global _process_of_threads
    process = os.getpid()
    if _process_of_threads is None:
        _process_of_threads = process
    elif _process_of_threads != process:
        raise ObjectStoreConfigurationError(
            f"obstore was used in process {_process_of_threads} before it forked this one, {process}, and its threads stayed "
            "there: each call would hang. Make the first call after the fork, or start workers by 'spawn'"
        )


@atexit.register
def _outlast_obstore() -> None:
    """Wait until no thread of obstore runs Python code: one that does when the interpreter ends aborts the process.

    Such a thread wakes the event loop with an answer, and may still be on its way back when the program, with that answer, is at
    its end. obstore's threads are not Python's own, so they are the ones with a frame that `threading` does not know.
    """
    deadline = time.monotonic() + _LAST_WAIT
    while True:
        time.sleep(0.001)  # lets those in that wait for the interpreter
        known = {thread.ident for thread in threading.enumerate()}
        if not sys._current_frames().keys() - known or time.monotonic() > deadline:
            return


def info_of(location: str, meta: Mapping[str, Any], attributes: Mapping[str, Any] | None = None) -> ObjectInfo:
    """Return what obstore says of an object; a listing has no attributes."""
    modified: datetime = meta["last_modified"]
    etag = str(meta.get("e_tag") or "").strip('"') or None
    known = attributes or {}
    encoding = known.get("Content-Encoding") or None
    return ObjectInfo(location, meta["size"], modified.astimezone(UTC), etag, known.get("Content-Type"), encoding)
