"""What must be true after a crash: at once, and when recovery is done."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import make_url, text, update
from sqlalchemy.pool import NullPool

from granite_storage import StoredObjectRef
from granite_storage.orm import Attachment
from granite_storage.orm.journal.jobs import SCAN
from granite_storage.orm.journal.tables import clock
from granite_storage.refs import iter_refs
from tests.faults.crash.children import PATIENCE
from tests.faults.crash.models import Place, Setting, content_of

__all__ = ["Audit", "audited"]


@asynccontextmanager
async def audited(setting: Setting) -> AsyncIterator[Audit]:
    """Give an audit of a place with empty tables."""
    async with replace(setting, is_synchronous=False).opened("crash-parent", poolclass=NullPool) as place:
        async with place.engine.begin() as connection:
            await connection.run_sync(setting.models.Base.metadata.drop_all)
            await connection.run_sync(setting.models.Base.metadata.create_all)
        await place.journal.check()
        yield Audit(place)
    if setting.is_sqlite:
        path = Path(str(make_url(setting.url).database))
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()


class Audit:
    """Looks at all rows and all objects of a place, from outside.

    Args:
        place: The place, opened by the parent.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    async def check_after_crash(self) -> None:
        """Check that every row's file is there with its bytes, as soon as the dead have let go; then recover, and check all."""
        await self.wait_for_the_dead()
        await self.check_rows()
        await self.recover()
        await self.check_everything()

    async def wait_for_the_dead(self) -> None:
        """Wait until the database has rolled back the transactions of the dead children."""
        if self.place.setting.is_sqlite:  # the locks of a file go with the process
            return
        if self.place.setting.is_postgres:
            count = (
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'crash-child' AND datname = current_database()"
            )
        else:
            count = "SELECT COUNT(*) FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()"
        deadline = time.monotonic() + PATIENCE
        while await self.scalar(count):
            assert time.monotonic() < deadline, "the database does not let go of its dead clients"
            await asyncio.sleep(0.01)

    async def recover(self) -> None:
        """Recover until the journal is empty.

        Leases and retentions are over at once: nobody is alive to need them. What a request that was cut off has sent may
        still arrive at a server, though, so that the time for this is slept out; a disk gets nothing from the dead.
        """
        deadline = time.monotonic() + PATIENCE
        while left := await self.journal_rows():
            assert time.monotonic() < deadline, f"recovery does not come to its end: {left}"
            await self.expire()
            await self.place.journal.recover()
            if not self.place.setting.is_local:
                await asyncio.sleep(0.1)

    async def expire(self) -> None:
        """Let all waits be over, but for what a transaction has locked."""
        tables = self.place.journal.tables
        if (sidecar := self.place.journal.sidecar) is not None:
            async with sidecar.writing() as connection:
                for table in (sidecar.tables.intent, sidecar.tables.reclaim):
                    await connection.execute(update(table).values(due=clock(-1.0)))
        for table in (tables.intent, tables.job, *((tables.reclaim,) if self.place.setting.is_local else ())):
            async with self.place.engine.begin() as connection:
                if self.place.setting.is_sqlite:  # what is read first there keeps a transaction from writing
                    await connection.execute(update(table).values(due=clock(-1.0)))
                    continue
                free = (
                    await connection.scalars(table.select().with_only_columns(table.c.id).with_for_update(skip_locked=True))
                ).all()
                await connection.execute(update(table).where(table.c.id.in_(free)).values(due=clock(-1.0)))

    async def journal_rows(self) -> dict[str, list[Any]]:
        """Return what the journal has written down."""
        tables = self.place.journal.tables
        found: dict[str, list[Any]] = {}
        async with self.place.engine.connect() as connection:
            for table in (tables.intent, tables.reclaim, tables.decision, tables.job):
                if rows := list(await connection.execute(table.select())):
                    found[table.name] = rows
        if (sidecar := self.place.journal.sidecar) is not None:
            async with sidecar.looking() as (_, connection):
                for table in (sidecar.tables.intent, sidecar.tables.reclaim):
                    if rows := list(await connection.execute(table.select())):
                        found[f"{table.name} of the sidecar"] = rows
        return found

    async def references(self) -> dict[tuple[str, int, str], tuple[StoredObjectRef, str]]:
        """Return the files that rows have, with what the rows say of them."""
        found: dict[tuple[str, int, str], tuple[StoredObjectRef, str]] = {}
        async with self.place.engine.connect() as connection:
            for model, names in ((self.place.models.Shelf, ["file"]), (self.place.models.Book, ["file", "kept"])):
                for row in await connection.execute(model.__table__.select()):
                    for name in names:
                        value, says = row._mapping[name], row._mapping[f"{name}_says"]
                        where = (model.__tablename__, row.id, name)
                        assert (value is None) == (says is None), f"{where} has {value} and says {says}"
                        if isinstance(value, Attachment):
                            found[where] = value.ref, says
        return found

    async def check_rows(self) -> dict[tuple[str, int, str], tuple[StoredObjectRef, str]]:
        """Check I1: every row's file is there, and it is the one that the row's transaction meant."""
        references = await self.references()
        for where, (ref, says) in references.items():
            assert await self.place.manager.exists(ref), f"I1: {where} refers to {ref.location}, which is gone"
            assert await self.place.manager.get(ref) == content_of(says), f"I1: {where} has other bytes than it says"
            for variant in (ref.variants or {}).values():
                assert await self.place.manager.exists(variant), f"I1: {where} has a variant at {variant.location}, which is gone"
                found, wanted = await self.place.manager.get(variant), hashlib.sha256(content_of(says)).hexdigest().encode()
                assert found == wanted, f"D1: {where} shows a variant of another file"
        await self.check_jobs([ref for ref, _ in references.values()])
        await self.check_variants({where: ref for where, (ref, _) in references.items()})
        locations = [one.location for ref, _ in references.values() for one in iter_refs(ref)]
        if not self.place.setting.has_triggers:  # else SQL makes them do so
            assert len(set(locations)) == len(locations), f"two rows share an object: {locations}"
        return references

    async def check_jobs(self, refs: list[StoredObjectRef]) -> None:
        """Check that what is held is to be scanned (D2), and that all else was."""
        job = self.place.journal.tables.job
        async with self.place.engine.connect() as connection:
            known = set(await connection.scalars(job.select().with_only_columns(job.c.location)))
        for ref in refs:
            assert ref.scan is not None, f"{ref.location} was never scanned"
            assert ref.scan["status"] == "clean" or ref.location in known, f"D2: {ref.location} is held, and no job scans it"

    async def check_variants(self, refs: dict[tuple[str, int, str], StoredObjectRef]) -> None:
        """Check that each variant is there, or is to be made (D2)."""
        job = self.place.journal.tables.job
        async with self.place.engine.connect() as connection:
            rows = await connection.execute(job.select().with_only_columns(job.c.location).where(job.c.key != SCAN))
            known = set(rows.scalars())
        for (table, key, name), ref in refs.items():
            lacks = table == "book" and "sum" not in (ref.variants or {})
            assert not lacks or ref.location in known, f"D2: {name} of book {key} has no variant, and no job makes it"

    async def check_everything(self) -> None:
        """Check I1 and I2, when the journal is empty."""
        references = {one.location for ref, _ in (await self.check_rows()).values() for one in iter_refs(ref)}
        orphans = await self.objects() - references
        assert not orphans, f"I2: nothing refers to {orphans}"
        assert not await self.open_uploads(), "I2: an upload in parts was left open"

    async def objects(self) -> set[str]:
        return {info.location async for info in self.place.backend.iter_objects()}

    async def open_uploads(self) -> list[str]:
        """Return the uploads in parts that are neither completed nor aborted."""
        if self.place.setting.is_local:
            return []
        async with self.place.backend.client() as client:
            answer = await client.list_multipart_uploads(Bucket=self.place.backend.bucket)
        return [upload["Key"] for upload in answer.get("Uploads", ())]

    async def scalar(self, statement: str) -> Any:
        async with self.place.engine.connect() as connection:
            return (await connection.execute(text(statement))).scalar_one()
