"""Ordinary operations of lists, of which each step is an event: what the list holds at the flush is what is kept, in its order.

After each, the `env` fixture checks that the set of objects equals the set of references.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy import event, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm.exc import StaleDataError

from granite_storage import StaleAttachmentError
from granite_storage.exceptions import CollectionFullError
from granite_storage.orm import Attachment, file_class
from tests.orm.collections.models import Album, Shelf, album, load, named, shown
from tests.orm.environment import OrmEnvironment
from tests.tiers import repetitions, seed

Photo: Any = file_class(Album.photos)


def swap(photos: Any) -> None:
    photos[0], photos[1] = photos[1], photos[0]


def rotate(photos: Any) -> None:
    first = photos[0]
    photos[0], photos[1], photos[2] = photos[1], photos[2], first


def append_again(photos: Any) -> None:
    photos.append(photos[0])
    del photos[0]


def append_and_pop(photos: Any) -> None:
    photos.append(photos[0])
    photos.pop()


def insert_again(photos: Any) -> None:
    photos.insert(0, photos[2])
    del photos[3]


def shuffle(photos: Any) -> None:
    random.Random(1).shuffle(photos)


def assign_twice(photos: Any) -> None:
    photos[0] = photos[1]


def exchange_slices(photos: Any) -> None:
    photos[:2], photos[2:] = photos[2:], photos[:2]


def repeat(photos: Any) -> None:
    photos *= 2


@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (swap, "bacd"),
        (rotate, "bcad"),
        (append_again, "bcda"),
        (append_and_pop, "abcd"),
        (insert_again, "cabd"),
        (shuffle, "dacb"),
        (assign_twice, "bcd"),
        (exchange_slices, "cdab"),
        (repeat, "abcd"),
    ],
)
async def test_exchanges(env: OrmEnvironment, change: Callable[[Any], None], expected: str, is_new: bool) -> None:
    """Of elements that have rows, and of new ones."""
    await env.add(album(1, "" if is_new else "abcd"))
    async with env.sessions.begin() as session:
        found = await load(session)
        found.photos.extend(map(named, "abcd" if is_new else ""))
        change(found.photos)
    assert await shown(env) == expected


class TestRandomly:
    async def test_as_a_list(self, env: OrmEnvironment) -> None:
        """The rows are the set of what a plain list would hold, in its order."""
        chance = random.Random(seed())
        for number in range(1, repetitions("LIST_SEQUENCES", default=6, exhaustive=100) + 1):
            await env.add(album(number, "abcd"))
            log: list[str] = []
            for _ in range(3):
                async with env.sessions.begin() as session:
                    found = await load(session, key=number)
                    files: Any = found.photos
                    texts = {file: file.file.original_filename for file in files}
                    plain = list(files)
                    for _ in range(chance.randrange(1, 9)):
                        self._change(chance, files, plain, texts, log)
                        if chance.random() < 0.1 and len(set(plain)) == len(plain):
                            await session.flush()
                            texts = {file: texts[file] for file in plain}
                    expected = "".join(texts[file][0] for file in dict.fromkeys(plain))
                assert await shown(env, key=number) == expected, log

    def _change(self, chance: random.Random, files: Any, plain: list[Any], texts: dict[Any, str], log: list[str]) -> None:
        size = len(plain)
        i, j = (chance.randrange(size), chance.randrange(size)) if size else (0, 0)
        new = Photo(named(letter := chance.choice("mnopqrst")))
        texts[new] = f"{letter}.txt"
        file = chance.choice([*plain, new])
        name = chance.choice(
            ["append", "insert", "set", "swap", "slice", "delete", "pop", "remove", "reverse", "shuffle", "clear"]
        )
        if (not size and name not in ("append", "insert")) or (name == "clear" and chance.random() < 0.8):
            return
        log.append(f"{name} {i} {j} {texts[file]}")
        state = chance.getstate()
        for target in (files, plain):
            chance.setstate(state)
            match name:
                case "append":
                    target.append(file)
                case "insert":
                    target.insert(i, file)
                case "set":
                    target[i] = file
                case "swap":
                    target[i], target[j] = target[j], target[i]
                case "slice":
                    target[min(i, j) : max(i, j)] = [file]
                case "delete":
                    del target[i]
                case "pop":
                    target.pop(i)
                case "remove":
                    target.remove(target[i])
                case "reverse":
                    target.reverse()
                case "shuffle":
                    chance.shuffle(target)
                case _:
                    target.clear()


class TestTakenOver:
    @pytest.mark.parametrize("is_loaded", [True, False])
    @pytest.mark.parametrize("way", ["append", "extend", "insert", "assign", "parent"])
    async def test_new(self, env: OrmEnvironment, way: str, is_loaded: bool) -> None:
        """A new element that another parent takes over before it has a row."""
        await env.add(album(1, "a"), album(2))
        async with env.sessions.begin() as session:
            one = await load(session)
            other = await load(session, key=2) if is_loaded or way != "parent" else await session.get_one(Album, 2)
            new = Photo(named("n"))
            one.photos.append(new)
            match way:
                case "append":
                    other.photos.append(new)
                case "extend":
                    other.photos.extend([new])
                case "insert":
                    other.photos.insert(0, new)
                case "assign":
                    other.photos = one.photos
                case _:
                    new.parent = other
        assert await shown(env, key=2) == ("an" if way == "assign" else "n")
        assert await shown(env, key=1) == ("" if way == "assign" else "a")

    async def test_of_a_deleted_parent(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "ab"), album(2))
        async with env.sessions.begin() as session:
            one, other = await load(session), await load(session, key=2)
            taken = one.photos[0]
            await session.delete(one)
            other.photos.append(taken)
        assert await shown(env, key=2) == "a"

    async def test_deleted_element_in_a_list_in_memory(self, env: OrmEnvironment) -> None:
        """The list of a session that does not expire its instances holds it until it is loaded again."""
        await env.add(album(1, "ab"))
        async with env.sessions() as session:
            found = await load(session)
            await session.delete(found.photos[0])
            await session.commit()
            found.photos.append(named("c"))
            await session.commit()
        assert await shown(env) == "bc"

    async def test_deleted_element_stays_deleted(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "abc"))
        async with env.sessions.begin() as session:
            found = await load(session)
            await session.delete(found.photos[0])
            swap(found.photos)
        assert await shown(env) == "bc"


class TestLockOrder:
    async def test_concurrent_replacements(self, env: OrmEnvironment) -> None:
        """They lock the parent before the rows of the files: in any other order MariaDB finds a deadlock."""
        await env.add(Shelf(id=1, books=[b"a", b"b", b"c"]))

        async def replace(index: int) -> None:
            async with env.sessions.begin() as session:
                found = await load(session, Shelf, 1, "books")
                found.books[index].file = Attachment(b"new")

        if env.database.name == "sqlite-begin":
            for index in range(3):
                await replace(index)
        else:
            await asyncio.gather(*(replace(index) for index in (0, 1, 2, 0, 1, 2)))
        assert await shown(env, Shelf, 1, "books") == "newnewnew"

    @pytest.mark.parametrize(
        ("model", "name", "forms"),
        [
            (Album, "photos", ["replace reorder"]),
            (Album, "photos", ["title replace", "title reorder"]),
            (Album, "photos", ["title replace", "reorder", "replace append"]),
            (Album, "photos", ["remove reorder append", "replace reorder"]),
            (Album, "photos", ["delete caption append", "reorder"]),
            (Shelf, "books", ["reorder", "remove append"]),
            (Shelf, "books", ["replace reorder"]),
        ],
    )
    async def test_concurrent_forms(self, env: OrmEnvironment, model: Any, name: str, forms: list[str]) -> None:
        """Each replaces, moves, adds or removes files in one flush: the transactions wait for each other, and none deadlocks."""
        if env.database.is_sqlite:
            pytest.skip("a transaction locks the whole file")
        await env.add(model(id=1, **{name: [b"x"] * 3}))
        outcomes: list[str] = []

        async def send(number: int) -> None:
            rng = random.Random(number)
            for turn in range(10):
                try:
                    async with env.sessions.begin() as session:
                        found = await load(session, model, 1, name)
                        await change(session, found, rng, forms[(number + turn) % len(forms)].split())
                except (StaleDataError, StaleAttachmentError, CollectionFullError):  # a file was deleted or added in the meantime
                    outcomes.append("stale")
                except DBAPIError as error:
                    outcomes.append(str(error.orig))

        async def change(session: Any, found: Any, rng: random.Random, steps: list[str]) -> None:
            files = getattr(found, name)
            for step in steps:
                match step:
                    case "title":
                        found.title = str(rng.random())
                    case "replace" if files:
                        rng.choice(files).file = Attachment(b"y")
                    case "caption" if files:
                        files[0].caption = str(rng.random())
                    case "reorder":
                        files.reorder(rng.sample([file.id for file in files], k=len(files)))
                    case "append":
                        files.append(b"z")
                    case "remove" if files:
                        files.remove(rng.choice(files))
                    case "delete" if files:
                        await session.delete(files[-1])

        await asyncio.gather(*map(send, range(6)))
        assert [outcome for outcome in outcomes if outcome != "stale"] == []

    async def test_statements(self, env: OrmEnvironment) -> None:
        """A replacement locks the rows that are moved in the statement that locks its own, and a mere change of order none."""
        await env.add(album(1, "abcd"))
        async with recorded(env) as statements:
            await change_order(env)
        assert len([one for one in statements if "FOR " in one and "album_photos" in one]) == 0
        counts = []
        for ordered in (False, True):
            async with recorded(env) as statements:
                await change_order(env, replaced=True, ordered=ordered)
            counts.append(len([one for one in statements if "FOR " in one and "FROM album_photos" in one]))
        assert counts[0] == counts[1]


@contextlib.asynccontextmanager
async def recorded(env: OrmEnvironment) -> AsyncIterator[list[str]]:
    """Give the statements that are executed meanwhile."""
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(env.engine.sync_engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(env.engine.sync_engine, "before_cursor_execute", note)


async def change_order(env: OrmEnvironment, *, replaced: bool = False, ordered: bool = True) -> None:
    async with env.sessions.begin() as session:
        found = await load(session)
        if ordered:
            found.photos.reverse()
        if replaced:
            found.photos[1].file = named("n")


async def test_reorder_with_an_id_twice(env: OrmEnvironment) -> None:
    await env.add(album(1, "abc"))
    async with env.sessions.begin() as session:
        photos = (await load(session)).photos
        a, _, c = (photo.id for photo in photos)
        photos.reorder([c, str(a), c])
    assert await shown(env) == "cab"


@pytest.mark.parametrize(
    ("index", "expected"), [(-1, "bca"), (-2, "bac"), (-3, "abc"), (-9, "abc"), (0, "abc"), (1, "bac"), (2, "bca"), (9, "bca")]
)
async def test_move_to_an_index(env: OrmEnvironment, index: int, expected: str) -> None:
    """The file is at that index afterwards, also at a negative one."""
    await env.add(album(1, "abc"))
    async with env.sessions.begin() as session:
        photos = (await load(session)).photos
        first = photos[0]
        photos.move(first, index)
        assert photos[max(index, -3) if index < 0 else min(index, 2)] is first
    assert await shown(env) == expected


async def test_smallest_keys(env: OrmEnvironment) -> None:
    """Files that SQL gave the smallest key are kept, and a list with them takes further ones at both ends."""
    await env.add(album(1, "abc"))
    async with env.sessions.begin() as session:
        await session.execute(update(Photo).values(position=-(2**63)))
    for letter in "xy":
        async with env.sessions.begin() as session:
            found = await load(session)
            found.photos.append(named(letter))
            found.photos.insert(0, named(letter.upper()))
    assert await shown(env) == "YXabcxy"
