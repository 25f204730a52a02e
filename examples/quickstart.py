"""Store real files on rows in SQLite: store, stream, roll back, swap, verify and delete them, and show the results.

    python examples/quickstart.py                        some files of this repository, and a generated large one
    python examples/quickstart.py report.pdf photo.jpg   your own files
    python examples/quickstart.py --large film.mkv       your own large file
    python examples/quickstart.py --root ./storage       in your own folder instead of a temporary one

It requires `aiosqlite` for the database, and `rich` for the progress bar and the table.
"""

from __future__ import annotations

import argparse
import asyncio
import mimetypes
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import aiofiles
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.tree import Tree
from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import (
    ChecksumMismatchError,
    ContentTooLargeError,
    StorageManager,
    StoragePolicy,
)
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.orm import Attachment, attachment, bind_storage

MIB = 1024 * 1024
Sessions = async_sessionmaker[AsyncSession]


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(unique=True)
    file: Mapped[Attachment] = attachment("documents", nullable=False)


class Lesson(Base):
    __tablename__ = "lesson"
    id: Mapped[int] = mapped_column(primary_key=True)
    video: Mapped[Attachment | None] = attachment("videos")


def make_manager(root: Path) -> StorageManager:
    """Two slots on one disk: documents of at most 16 MiB, and videos of any size."""
    return StorageManager(
        backends={"local": LocalStorageBackend(root_dir=root)},
        policies={
            "documents": StoragePolicy(
                storage_key="documents",
                backend_key="local",
                max_size=16 * MIB,
                key_prefix="documents",
            ),
            "videos": StoragePolicy(
                storage_key="videos", backend_key="local", key_prefix="videos"
            ),
        },
    )


class Report:
    """Prints each step as it happens, and all of them as a table at the end."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.table = Table(
            title="What happened",
            title_justify="left",
            title_style="bold",
            expand=False,
        )
        for heading in ("Call", "Outcome"):
            self.table.add_column(heading)
        for heading in ("Bytes", "Time", "Rate"):
            self.table.add_column(heading, justify="right", no_wrap=True)

    def step(self, title: str) -> None:
        self.console.print(f"\n[bold cyan]{title}[/]")

    def say(self, text: str) -> None:
        self.console.print(f"  {text}", soft_wrap=True)

    @contextmanager
    def timed(self, call: str, outcome: str, size: int = 0) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        rate = f"{decimal(int(size / seconds))}/s" if size >= MIB else ""
        self.table.add_row(
            call,
            escape(outcome),
            decimal(size) if size else "",
            f"{seconds * 1000:,.1f} ms",
            rate,
        )


async def size_of(path: Path) -> int:
    return await asyncio.to_thread(os.path.getsize, path)


async def store(sessions: Sessions, files: Sequence[Path], report: Report) -> None:
    """Insert a row for each file, in its own transaction: both exist, or neither."""
    report.step("Store")
    for number, path in enumerate(files, start=1):
        async with aiofiles.open(path, "rb") as source:
            file = Attachment(
                source,
                filename=path.name,
                content_type=mimetypes.guess_type(path.name)[0],
            )
            with report.timed("INSERT", path.name, await size_of(path)):
                try:
                    async with sessions.begin() as session:
                        session.add(
                            Document(
                                id=number, title=f"{number} {path.name}", file=file
                            )
                        )
                except ContentTooLargeError as error:
                    report.say(
                        f"[red]refused[/] {escape(path.name)}: {escape(str(error))}"
                    )
                    continue
        report.say(
            f"[green]stored[/] {escape(path.name)}, {decimal(file.size)}, {file.checksum[:19]}..."
        )


async def stream_large(sessions: Sessions, path: Path, report: Report) -> None:
    """Stream a large file into a row; memory holds a few chunks, whatever its size."""
    report.step("Stream a large file")
    columns = (
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with (
        Progress(
            TextColumn("  {task.description}"), *columns, console=report.console
        ) as progress,
        progress.open(path, "rb", description=escape(path.name)) as source,
        report.timed("INSERT", path.name, await size_of(path)),
    ):
        async with sessions.begin() as session:
            session.add(Lesson(id=1, video=Attachment(source, filename=path.name)))


async def refuse_endless(sessions: Sessions, report: Report) -> None:
    """Try to store a stream that never ends."""
    report.step("Refuse what is too large")
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 65536
            yield bytes(65536)

    with report.timed("INSERT", "endless stream refused"):
        try:
            async with sessions.begin() as session:
                session.add(Document(title="endless", file=Attachment(endless())))
        except ContentTooLargeError as error:
            report.say(f"[red]{type(error).__name__}[/]: {escape(str(error))}")
    report.say(
        f"it was asked for {decimal(sent)}, and neither a row nor a byte of it is there"
    )


async def roll_back(sessions: Sessions, root: Path, report: Report) -> None:
    """Replace a file and let the transaction fail: the new file is deleted."""
    report.step("Roll back a transaction")
    before = await objects_in(root)
    with report.timed("ROLLBACK", "the old file stays"):
        try:
            async with sessions.begin() as session:
                document = await first_document(session)
                name = document.file.original_filename
                document.file = Attachment(b"a second edition", filename="second.txt")
                await session.flush()
                report.say(
                    f"replaced {escape(name or '')}; {len(await objects_in(root))} objects are on the disk"
                )
                raise RuntimeError("the payment was refused")
        except RuntimeError as error:
            report.say(f"[red]{type(error).__name__}[/]: {error}")
    async with sessions() as session:
        document = await first_document(session)
        await document.file.read()
    same = (
        "the same objects"
        if await objects_in(root) == before
        else "not the objects that were there"
    )
    report.say(
        f"rolled back: the row holds {escape(document.file.original_filename or '')}, and on the disk are {same} as before"
    )


async def roll_back_to_savepoint(
    sessions: Sessions, root: Path, report: Report
) -> None:
    """Roll back the changes of a savepoint, and keep those around it."""
    report.step("Roll back to a savepoint")
    before = await objects_in(root)
    with report.timed("SAVEPOINT", "inner lost, outer kept"):
        async with sessions.begin() as session:
            session.add(
                Document(
                    title="kept",
                    file=Attachment(b"outside of the savepoint", filename="kept.txt"),
                )
            )
            await session.flush()
            try:
                async with session.begin_nested():
                    session.add(
                        Document(
                            title="lost",
                            file=Attachment(b"inside", filename="lost.txt"),
                        )
                    )
                    await session.flush()
                    session.add(
                        Document(
                            title="kept",
                            file=Attachment(b"inside too", filename="twice.txt"),
                        )
                    )
            except IntegrityError as error:
                report.say(f"[red]{type(error).__name__}[/]: {escape(str(error.orig))}")
    new = [path.name.partition("-")[2] for path in await objects_in(root) - before]
    report.say(
        f"committed: {', '.join(new)} is new on the disk; lost.txt and twice.txt are not there"
    )


async def read(sessions: Sessions, report: Report) -> None:
    """Read a small file, a range of a large one, and a large one as a verified stream."""
    report.step("Read back")
    async with sessions() as session:
        small, large = (await first_document(session)).file, await video_of(session, 1)
    with report.timed("read", "whole, verified", small.size):
        content = await small.read()
    report.say(
        f"read: {decimal(len(content))} of {escape(small.original_filename or small.location)}, verified"
    )

    middle = large.size // 2
    with report.timed("open", f"range at {decimal(middle)}", 16):
        async with large.open(offset=middle, length=16) as reader:
            piece = await reader.read()
    report.say(f"range: {piece.hex(' ')}, and no other byte was read")

    with report.timed("open", "streamed, verified", large.size):
        async with large.open(verify=True) as reader:
            seen = sum([len(chunk) async for chunk in reader])
    report.say(f"stream: {decimal(seen)}, verified")


async def show_disk(root: Path, report: Report) -> None:
    """Show what the backend stores: plain files in readable folders."""
    report.step("On disk")
    report.console.print(await asyncio.to_thread(make_tree, root))


async def detect_damage(sessions: Sessions, root: Path, report: Report) -> None:
    """Flip one bit behind the library's back, as a failing disk does."""
    report.step("Detect damage")
    async with sessions() as session:
        file = (await first_document(session)).file
    await asyncio.to_thread(flip_bit, root / file.location)
    report.say(
        f"one bit of {escape(file.original_filename or file.location)} was flipped on the disk"
    )
    with report.timed("read", "flipped bit refused"):
        try:
            await file.read()
        except ChecksumMismatchError as error:
            report.say(f"[red]{type(error).__name__}[/]: expected {error.expected}")
            report.say(f"{'':<21}  but found {error.actual}")


async def copy_move_and_delete(sessions: Sessions, root: Path, report: Report) -> None:
    """Copy a file to a second row, move it to a third, then delete every row."""
    report.step("Copy, move and delete")
    async with sessions() as session:
        video = await video_of(session, 1)
    with report.timed("INSERT", "a copy for another row", video.size):
        async with sessions.begin() as session:
            session.add(Lesson(id=2, video=video))
    async with sessions.begin() as session:
        copied = await video_of(session, 2)
    report.say(f"copied to {escape(copied.location)}")
    with report.timed("UPDATE", "moved to another row"):
        async with sessions.begin() as session:
            giver = await session.get_one(Lesson, 2)
            session.add(Lesson(id=3, video=giver.video))
            giver.video = None
    async with sessions() as session:
        moved = await video_of(session, 3)
    report.say(
        f"moved to a third row: {'no byte of it was moved' if moved.ref == copied.ref else 'it was copied'}"
    )
    count = len(await objects_in(root))
    with report.timed("DELETE", f"all rows, {count} objects"):
        async with sessions.begin() as session:
            await session.execute(delete(Document))
            await session.execute(delete(Lesson))
    report.say(
        f"deleted every row and with them {count} objects, {len(await objects_in(root))} are left"
    )


async def first_document(session: AsyncSession) -> Document:
    """Return the first document whose file is not empty."""
    statement = (
        select(Document)
        .where(Document.file["size"].as_integer() > 0)
        .order_by(Document.id)
        .limit(1)
    )
    return (await session.scalars(statement)).one()


async def video_of(session: AsyncSession, lesson_id: int) -> Attachment:
    video = (await session.get_one(Lesson, lesson_id)).video
    if video is None:
        raise LookupError(f"lesson {lesson_id} has no video")
    return video


async def show(
    root: Path, database: Path, files: Sequence[Path], large: Path, console: Console
) -> None:
    report = Report(console)
    engine = create_async_engine(f"sqlite+aiosqlite:///{database}")
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    async with make_manager(root) as manager:
        binding = bind_storage(Base, manager, session_factory=sessions)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await store(sessions, files, report)
        await stream_large(sessions, large, report)
        await refuse_endless(sessions, report)
        await roll_back_to_savepoint(sessions, root, report)
        await roll_back(sessions, root, report)
        await read(sessions, report)
        await show_disk(root, report)
        await detect_damage(sessions, root, report)
        await copy_move_and_delete(sessions, root, report)
        await show_disk(root, report)
        binding.unbind()
    await engine.dispose()
    console.print()
    console.print(report.table)


async def objects_in(root: Path) -> set[Path]:
    return await asyncio.to_thread(find_objects, root)


def find_objects(root: Path) -> set[Path]:
    return {
        path
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def make_tree(folder: Path) -> Tree:
    tree = Tree(f"[bold]{escape(folder.name)}/[/]", guide_style="dim")
    add_branches(tree, folder)
    return tree


def add_branches(tree: Tree, folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            add_branches(tree.add(f"{escape(path.name)}/"), path)
        else:
            tree.add(f"{escape(path.name)} [dim]{decimal(path.stat().st_size)}[/]")


def flip_bit(path: Path) -> None:
    with open(path, "r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


def make_large_file(folder: Path, mebibytes: int) -> Path:
    path = folder / "lecture.mp4"
    block = os.urandom(MIB)
    with open(path, "wb") as file:
        for _ in range(mebibytes):
            file.write(block)
    return path


def files_of_the_repository() -> list[Path]:
    here = Path(__file__).parents[1]
    return [
        path
        for path in sorted(here.iterdir())
        if path.suffix in {".md", ".toml", ".py"} and path.is_file()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Keep real files on rows in SQLite: store, stream, roll back, verify, copy, move and delete them."
    )
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="files to store"
    )
    parser.add_argument(
        "--large",
        type=Path,
        metavar="FILE",
        help="a large file to stream; one is made if there is none",
    )
    parser.add_argument(
        "--mebibytes",
        type=int,
        default=256,
        metavar="N",
        help="how large to make it (256)",
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="FOLDER",
        help="where to store; a temporary folder if it is not given",
    )
    options = parser.parse_args()
    for path in filter(None, [*options.files, options.large]):
        if not path.is_file():
            parser.error(f"{path} is not a file")
    if options.mebibytes < 1 or (options.large and not options.large.stat().st_size):
        parser.error("the large file must not be empty")
    files = options.files or files_of_the_repository()
    with tempfile.TemporaryDirectory(prefix="granite-") as scratch:
        root = options.root or Path(scratch, "storage")
        root.mkdir(parents=True, exist_ok=True)
        large = options.large or make_large_file(Path(scratch), options.mebibytes)
        console = Console()
        console.print(
            "[bold]Granite Storage[/]: files that commit and roll back with your rows"
        )
        asyncio.run(show(root, Path(scratch, "rows.db"), files, large, console))


if __name__ == "__main__":
    main()
