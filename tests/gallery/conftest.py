"""The gallery in an empty folder for each test, with two users."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

MAX_SIZE = 1_000_000
TOKENS = {"Anna": "the-token-of-anna", "Ben": "the-token-of-ben"}


def forget() -> None:
    for name in [name for name in sys.modules if f"{name}.".startswith("examples.gallery.")]:
        del sys.modules[name]


@contextlib.contextmanager
def application(folder: Path, **environment: str) -> Iterator[Any]:
    """Give the application's module, imported again for what the environment says."""
    with pytest.MonkeyPatch.context() as patch:
        own = {"GALLERY_FOLDER": str(folder / "data"), "GALLERY_TOKENS": json.dumps(TOKENS)}
        for name, value in {**own, **environment}.items():
            patch.setenv(name, value)
        forget()
        yield importlib.import_module("examples.gallery.app")
        sys.modules["examples.gallery.models"].binding.unbind()
        forget()


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Any]:
    with application(tmp_path, MAX_SIZE=str(MAX_SIZE), GALLERY_URL="http://127.0.0.1") as found:
        yield found


@pytest.fixture
async def gallery(module: Any) -> AsyncIterator[Any]:
    async with module.app.router.lifespan_context(module.app):
        yield module


def client_of(gallery: Any, user: str | None) -> httpx.AsyncClient:
    """Return a client that sends what the gallery's own pages send with each change, signed in if a user is named."""
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(gallery.app),
        base_url="http://127.0.0.1",
        headers={"X-Gallery": "1"},
        cookies={} if user is None else {"gallery_token": TOKENS[user]},
    )


@pytest.fixture
async def idle(module: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gallery that has not started, for what needs no database: to start takes longer than most tests."""
    async with client_of(module, None) as client:
        yield client


@pytest.fixture
async def client(gallery: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of Anna, whose album has the primary key 1."""
    async with client_of(gallery, "Anna") as client:
        yield client


@pytest.fixture
async def ben(gallery: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of Ben, whose album has the primary key 2."""
    async with client_of(gallery, "Ben") as client:
        yield client


@pytest.fixture
async def guest(gallery: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client that has not signed in."""
    async with client_of(gallery, None) as client:
        yield client
