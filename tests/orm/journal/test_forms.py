"""Forms whose files a journal knows of."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from granite_storage.web import stream_upload
from tests.orm.environment import Doc, OrmEnvironment
from tests.web.receiving import END, FORM, part

Receive = Callable[[], Awaitable[dict[str, Any]]]

FIRST, SECOND = part("file", b"first", filename="a"), part("other", b"second", filename="b")


def request_of(receive: Receive) -> Request:
    headers = [(b"content-type", FORM["Content-Type"].encode())]
    return Request({"type": "http", "method": "POST", "headers": headers}, receive)  # type: ignore[arg-type]


def sending(*messages: dict[str, Any], then: Receive | None = None) -> Receive:
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if not left and then is not None:
            return await then()
        return left.pop(0)

    return receive


def piece(content: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": content, "more_body": more}


async def intents(env: OrmEnvironment) -> int:
    return len(await env.journal_rows("intent"))


TARGETS = {"file": Doc.file, "other": Doc.other}


async def test_a_form_that_a_row_takes(env: OrmEnvironment) -> None:
    receive = sending(piece(FIRST), piece(SECOND + END, more=False))
    async with await stream_upload(request_of(receive), TARGETS) as form:
        assert await intents(env) == 2
        await env.add(Doc(id=1, file=form.files["file"], other=form.files["other"]))
    assert await intents(env) == 0
    await env.check(file_1="first", other_1="second")


@pytest.mark.case("CAN-05")
async def test_a_client_that_goes_away_leaves_nothing(env: OrmEnvironment) -> None:
    receive = sending(piece(FIRST), piece(SECOND[:-3]), {"type": "http.disconnect"})
    with pytest.raises(ClientDisconnect):
        await stream_upload(request_of(receive), TARGETS)
    assert (await intents(env), await env.objects()) == (0, set())


async def test_a_block_that_raises_leaves_nothing(env: OrmEnvironment) -> None:
    receive = sending(piece(FIRST + SECOND + END, more=False))
    with pytest.raises(RuntimeError):
        async with await stream_upload(request_of(receive), TARGETS):
            raise RuntimeError
    assert (await intents(env), await env.objects()) == (0, set())


@pytest.mark.case("CAN-05")
async def test_a_cancelled_form_leaves_nothing(env: OrmEnvironment) -> None:
    begun = asyncio.Event()

    async def never() -> dict[str, Any]:
        begun.set()
        return await asyncio.Future[dict[str, Any]]()

    task = asyncio.create_task(stream_upload(request_of(sending(piece(FIRST + SECOND[:-3]), then=never)), TARGETS))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await intents(env), await env.objects()) == (0, set())
    await env.recover()
