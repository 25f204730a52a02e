"""The S3 client of each event loop: opened when first needed, off the loop where possible, and shared by every call."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import threading
import warnings
import weakref
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from granite_storage.backends._s3_client import S3Client, S3Settings, threads
from granite_storage.backends._s3_errors import translate
from granite_storage.backends._s3_traits import ServerTraits

__all__ = ["S3Clients", "client_config", "is_installed"]

_PATIENCE = 5.0
_AMAZON = (".amazonaws.com", ".amazonaws.com.cn")
_SDKS = ("aioboto3", "aiobotocore")
_MODELS = ("service-2", "endpoint-rule-set-1")
_TABLES = ("_retry", "endpoints", "partitions", "sdk-default-configuration")


class S3Clients:
    """Opens a client for each event loop that calls, and closes it with the loop or before.

    A client lives in an asynchronous generator, which the loop closes when `asyncio.run` ends; so one that nobody closed
    leaves no connection behind.
    """

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopState] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._preparing = threading.Lock()
        self._session = settings.session
        self._traits = ServerTraits(settings.bucket, settings.conditional_writes)

    async def get(self) -> S3Client:
        """Return the running loop's client; the first of several calls at once opens it."""
        state = self._here()
        client = state.client
        if client is None or client.closed:
            async with state.opening:
                client = state.client
                if client is None or client.closed:
                    client = await self._open(state)
        return client

    async def aclose(self) -> None:
        """Close the running loop's client, and let go of those whose loops are closed."""
        state = self._here()
        async with state.opening:
            state.client = None
            if state.life is not None:
                life, state.life = state.life, None
                await life.aclose()

    def _here(self) -> _LoopState:
        loop = asyncio.get_running_loop()
        state = self._loops.get(loop)
        if state is None:
            with self._lock:
                for closed in [other for other in self._loops if other.is_closed()]:
                    self._loops.pop(closed).discard()
                state = self._loops.setdefault(loop, _LoopState())
        return state

    async def _open(self, state: _LoopState) -> S3Client:
        try:
            session, config = await threads.run(self._prepare, patience=_PATIENCE)
            state.life = _live(session, config, self._settings, self._traits)
            state.client = await anext(state.life)
        except Exception as error:
            raise translate(error, "open", bucket=self._settings.bucket) from error
        return state.client

    def _prepare(self) -> tuple[Any, Any]:
        """Do what takes long, once for all loops: import the SDK and read its models, which it keeps."""
        with self._preparing:
            if self._session is None:
                self._session = _new_session()
            with contextlib.suppress(ImportError):  # a session of aiobotocore does without
                importlib.import_module("aioboto3.s3.inject")
            _read_models(self._session)
            return self._session, client_config(self._settings)


async def _live(session: Any, config: Any, settings: S3Settings, traits: ServerTraits) -> AsyncGenerator[S3Client, None]:
    """Yield a client and close it. The generator knows nothing of who holds it: dropped, it is closed by its loop at once."""
    open_client = session.create_client if _is_bare(session) else session.client
    async with contextlib.AsyncExitStack() as clients:
        raw = signer = await clients.enter_async_context(
            open_client("s3", **_with_verify(settings.client_kwargs, config), config=config)
        )
        await asyncio.sleep(0)  # so that the first request's own set-up is another turn of the loop
        if settings.presign_endpoint_url is not None:
            kwargs = {**settings.client_kwargs, "endpoint_url": settings.presign_endpoint_url}
            signer = await clients.enter_async_context(open_client("s3", **_with_verify(kwargs, config), config=config))
        elif "endpoint_url" not in settings.client_kwargs:
            _sign_for_the_region(raw, settings.bucket)
        client = S3Client(raw, session, settings, traits, signer=signer, pool_size=config.max_pool_connections)
        try:
            yield client
        finally:
            client.closed = True


def _sign_for_the_region(raw: Any, bucket: str) -> None:
    """Have Amazon's URLs presigned for the bucket's own host in its region.

    The SDK signs them for `bucket.s3.amazonaws.com`, which answers 307 for buckets of other regions: a browser's preflight may
    not follow that, and newer regions refuse the signature. A name with a dot has no host of its own that TLS would accept.
    """
    host = urlsplit(raw.meta.endpoint_url).hostname or ""
    given = raw.meta.config.s3 or {}
    if host.endswith(_AMAZON) and "." not in bucket and "addressing_style" not in given:
        raw.meta.config.s3 = {**given, "addressing_style": "virtual"}


class _LoopState:
    def __init__(self) -> None:
        self.opening = asyncio.Lock()
        self.client: S3Client | None = None
        self.life: AsyncGenerator[S3Client, None] | None = None

    def discard(self) -> None:
        """Let go of a client whose loop was closed without a word to its generators: nothing can be awaited any more."""
        if self.client is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                for session in self.client.http_sessions():
                    session.detach()
            self.client = self.life = None


def is_installed() -> bool:
    """Tell whether there is an SDK."""
    return any(importlib.util.find_spec(name) is not None for name in _SDKS)


def _new_session() -> Any:
    """Return a session of aioboto3 where that is installed, else one of aiobotocore."""
    if importlib.util.find_spec(_SDKS[0]) is not None:
        return importlib.import_module(_SDKS[0]).Session()
    return importlib.import_module("aiobotocore.session").get_session()


def _is_bare(session: Any) -> bool:
    """Tell whether a session is one of aiobotocore itself, and not of aioboto3, which has one inside."""
    return hasattr(session, "create_client")


def _with_verify(client_kwargs: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Spare a plain HTTP endpoint the reading of all the certificates, which takes 50 ms of the loop and verifies nothing."""
    plain = str(client_kwargs.get("endpoint_url") or "").startswith("http://")
    if plain and not config.proxies and not getproxies():
        return {"verify": False, **client_kwargs}
    return dict(client_kwargs)


def _read_models(session: Any) -> None:
    """Have a session read ahead what making a client reads; an SDK that keeps it elsewhere reads it later, on the loop."""
    with contextlib.suppress(Exception):
        botocore_session = session if _is_bare(session) else session._session
        loader = botocore_session.get_component("data_loader")
        for model in _MODELS:
            loader.load_service_model("s3", model, api_version=None)
        for table in _TABLES:
            loader.load_data(table)
        botocore_session.get_scoped_config()


def client_config(settings: S3Settings) -> Any:
    """Return the client's configuration: what the caller gave, over what the backend needs."""
    config_class = importlib.import_module("aiobotocore.config").AioConfig
    given = settings.config
    ours = config_class(
        connect_timeout=settings.connect_timeout,
        max_pool_connections=settings.max_pool_connections,
        read_timeout=settings.read_timeout,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"mode": "standard", "total_max_attempts": 1},
        s3={"payload_signing_enabled": False, "us_east_1_regional_endpoint": "regional"},
        signature_version="s3v4",
    )
    if given is None:
        return ours
    merged = ours.merge(given)
    merged.s3 = {**(given.s3 or ours.s3), "payload_signing_enabled": False}
    for name in ("connector_args", "http_session_cls"):
        if hasattr(given, name):
            setattr(merged, name, getattr(given, name))
    return merged
