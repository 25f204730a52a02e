"""One of several uploads of a flush fails when others are stored already."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from granite_storage.orm import Attachment
from tests.orm.environment import Doc, OrmEnvironment, file


@pytest.mark.parametrize("database", ["sqlite-begin"], indirect=True)
async def test_what_was_stored_before_is_removed(env: OrmEnvironment) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        async with asyncio.timeout(10):
            while not await env.objects():  # noqa: ASYNC110  # the other upload has no event to tell of its end
                await asyncio.sleep(0.01)
        yield b"some"
        raise RuntimeError("the source fails")

    with pytest.raises(RuntimeError, match="the source fails"):
        await env.add(Doc(id=1, file=file("a"), other=Attachment(chunks())))
    await env.check()
