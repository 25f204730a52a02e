"""What the tests of simpler variants share: scenarios of one interleaving each, and the question which invariants are broken."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from granite_storage import StoredObjectRef
from granite_storage.exceptions import ContentError, StaleAttachmentError
from granite_storage.orm import Attachment
from granite_storage.orm.journal.recovery import Recovery
from tests.orm.environment import Doc, OrmEnvironment

__all__ = [
    "Scenario",
    "Variant",
    "commit",
    "expire",
    "name_of",
    "recover",
    "require_broken",
    "stopped",
    "violations",
    "without_reference_check",
]

Scenario = Callable[[OrmEnvironment, pytest.MonkeyPatch], Awaitable[None]]
Variant = Callable[[pytest.MonkeyPatch], None]


async def expire(env: OrmEnvironment) -> None:
    """Let every lease and every wait run out, but those whose rows a transaction has locked."""
    await env.expire()


async def recover(env: OrmEnvironment) -> Any:
    assert env.journal is not None
    return await env.journal.recover()


async def violations(env: OrmEnvironment) -> set[str]:
    """Return which invariants do not hold once nothing is in progress any more."""
    for _ in range(3):
        await expire(env)
        await recover(env)
        if await env.is_settled():
            break
    references = (await env.references()).values()
    referenced, objects = {ref.location for ref in references}, await env.objects()
    wrong = [ref for ref in references if ref.location in objects and not await has_its_bytes(env, ref)]
    broken = {"I1": [*(referenced - objects), *wrong], "I2": objects - referenced}
    return {name for name, found in broken.items() if found}


async def has_its_bytes(env: OrmEnvironment, ref: StoredObjectRef) -> bool:
    try:
        await env.manager.get(ref)
    except ContentError:
        return False
    return True


@contextlib.asynccontextmanager
async def stopped(monkeypatch: pytest.MonkeyPatch, env: OrmEnvironment, step: str) -> AsyncIterator[None]:
    """Let a worker run until just before a step, and on from there when the block ends."""
    reached, go = asyncio.Event(), asyncio.Event()
    original = getattr(Recovery, step)

    async def wait(*args: Any) -> Any:
        reached.set()
        await go.wait()
        return await original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Recovery, step, wait)
        worker = asyncio.create_task(recover(env))
        await asyncio.wait([worker, asyncio.create_task(reached.wait())], return_when=asyncio.FIRST_COMPLETED)
        yield
        go.set()
        await worker


async def commit(env: OrmEnvironment, attachment: Attachment) -> None:
    """Let a row take an attachment; an application would try again where it has come too late."""
    with contextlib.suppress(StaleAttachmentError):
        await env.add(Doc(id=1, file=attachment))


def without_reference_check(patch: pytest.MonkeyPatch) -> None:
    """The worker does not look whether any row refers to an object."""
    original = Recovery._check

    async def check(*args: Any) -> Any:
        own, _ = await original(*args)
        return own, set()

    patch.setattr(Recovery, "_check", check)


def name_of(value: Any) -> str:
    return getattr(value, "__name__", str(value))


async def require_broken(env: OrmEnvironment, scenario: Scenario, variant: Variant, broken: str) -> None:
    """Check that an invariant is broken where the variant is in force."""
    with pytest.MonkeyPatch.context() as patch:
        variant(patch)
        with pytest.MonkeyPatch.context() as inner:
            await scenario(env, inner)
        assert broken in await violations(env)
