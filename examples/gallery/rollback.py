"""A transaction that stores, replaces and deletes files, then fails or commits; its state before, during and after."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from examples.gallery.models import WRITTEN_TO, Note, sessions, storage
from granite_storage.orm import Attachment

router = APIRouter()
one_at_a_time = asyncio.Lock()


def note(number: int) -> Note:
    return Note(id=number, title=f"note-{number}", file=written(f"note-{number}"))


def written(title: str, version: int = 1) -> Attachment:
    content = f"This is {title} in version {version}.".encode()
    return Attachment(content, filename=f"{title}-v{version}.txt", content_type="text/plain")


@router.post("/rollback")
async def run(fail: bool) -> dict[str, Any]:
    """Run one transaction: it replaces a note's file, adds a note, deletes one, and then commits, or fails."""
    async with one_at_a_time:
        async with sessions() as session:
            before = await state(session)
        during, error = before, None
        try:
            async with sessions.begin() as session:
                oldest, second = await session.scalars(select(Note).order_by(Note.id).limit(2))
                oldest.version += 1
                oldest.file = written(oldest.title, oldest.version)
                await session.delete(second)
                session.add(note(second.id + 1))
                await session.flush()
                during = await state(session)
                if fail:  # the title is taken, so the database refuses the row after its file was stored
                    session.add(Note(id=second.id + 2, title=oldest.title, file=written("one-too-many")))
        except IntegrityError as refusal:
            error = str(refusal.orig)
        async with sessions() as session:
            return {"before": before, "during": during, "after": await state(session), "error": error}


@router.get("/rollback/state")
async def present() -> dict[str, Any]:
    """Return the current rows and files."""
    async with one_at_a_time, sessions() as session:
        return await state(session)


async def begin_with_two_notes() -> None:
    async with sessions.begin() as session:
        if not await session.scalar(select(func.count()).select_from(Note)):
            session.add_all([note(1), note(2)])


async def state(session: AsyncSession) -> dict[str, Any]:
    """Read the rows as this transaction sees them, and list the storage itself; nothing is cached or computed."""
    notes = await session.scalars(select(Note).order_by(Note.id).execution_options(populate_existing=True))
    rows = [{"id": one.id, "title": one.title, "file": name_of(one.file.location), "size": one.file.size} for one in notes]
    found = [info async for info in storage.backends[WRITTEN_TO].iter_objects("notes")]
    return {"rows": rows, "files": [{"name": name_of(info.location), "size": info.size} for info in found]}


def name_of(location: str) -> str:
    return location.rpartition("/")[2]
