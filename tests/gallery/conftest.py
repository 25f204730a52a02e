"""The gallery, made anew in an empty folder for each test."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

MAX_SIZE = 1_000_000


def forget() -> None:
    for name in [name for name in sys.modules if f"{name}.".startswith("examples.gallery.")]:
        del sys.modules[name]


@contextlib.contextmanager
def application(folder: Path, **environment: str) -> Iterator[Any]:
    """Give the application's module, imported anew for what the environment says."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"GALLERY_FOLDER": str(folder / "data"), **environment}.items():
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


@pytest.fixture
async def client(gallery: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client that sends what the gallery's own pages send with each change."""
    transport = httpx.ASGITransport(gallery.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers={"X-Gallery": "1"}) as client:
        yield client
