"""A transaction on files that commits or fails, and what is stored at each moment."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from examples.gallery.models import WRITTEN_TO, Note, sessions, storage
from granite_storage.orm import Attachment

Moments = dict[str, Any]

router = APIRouter(prefix="/rollback")
one_at_a_time = asyncio.Lock()


def text(title: str, version: int = 1) -> Attachment:
    content = f"This is {title} in version {version}.".encode()
    return Attachment(
        content, filename=f"{title}-v{version}.txt", content_type="text/plain"
    )


async def change_notes(fail: bool, seen: Moments) -> None:
    async with sessions.begin() as session:
        query = select(Note).order_by(Note.id).limit(2)
        first, second = await session.scalars(query)
        first.version += 1
        first.file = text(first.title, first.version)
        await session.delete(second)
        title = f"note-{second.id + 1}"
        session.add(Note(title=title, file=text(title)))
        await session.flush()

        seen["during"] = await read_state(session)

        if fail:  # a second note with this title is refused
            file = text("one-too-many")
            session.add(Note(title=title, file=file))


@router.post("")
async def run(fail: bool) -> Moments:
    """Run the transaction; return what was there before, during and after it."""
    async with one_at_a_time:
        seen: Moments = {"before": await read_committed(), "error": None}
        try:
            await change_notes(fail, seen)
        except IntegrityError as refusal:
            seen["error"] = str(refusal.orig)
        return seen | {"ended": await read_committed()}


@router.get("")
async def show_state() -> dict[str, Any]:
    """Return the committed rows and the files that are stored now."""
    async with one_at_a_time:
        return await read_committed()


async def read_committed() -> dict[str, Any]:
    async with sessions() as session:
        return await read_state(session)


async def read_state(session: AsyncSession) -> dict[str, Any]:
    """Read the rows as this session sees them, and list the storage itself."""
    notes = await session.scalars(
        select(Note).order_by(Note.id).execution_options(populate_existing=True)
    )
    rows = [
        {"title": note.title, "file": name_of(note.file.location)} for note in notes
    ]
    found = [info async for info in storage.backends[WRITTEN_TO].iter_objects("notes")]
    return {"rows": rows, "files": sorted(name_of(info.location) for info in found)}


def name_of(location: str) -> str:
    return location.rpartition("/")[2]


async def add_two_notes() -> None:
    """Begin with two notes, unless there are some."""
    async with sessions.begin() as session:
        if not await session.scalar(select(func.count()).select_from(Note)):
            session.add_all(
                [Note(title=title, file=text(title)) for title in ("note-1", "note-2")]
            )
