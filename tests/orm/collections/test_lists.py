"""Lists of files: what can be added, moved, replaced and removed, and what of it a rollback undoes.

After each, the `env` fixture checks that the set of objects equals the set of references.
"""

from __future__ import annotations

import io
import pickle
import random
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased, joinedload
from sqlalchemy.orm.exc import DetachedInstanceError
from starlette.datastructures import Headers, UploadFile

from granite_storage import StorageGarbageCollector, StoredObjectRef
from granite_storage.exceptions import BackendUnavailableError, EmptyUploadError
from granite_storage.orm import AttachmentList, append_files, count_files, file_class, sum_sizes
from granite_storage.verification import verify
from tests.orm.collections.models import UPPER, Album, Base, Series, album, load, named, shown
from tests.orm.environment import OrmEnvironment
from tests.tiers import repetitions, seed

Photo: Any = file_class(Album.photos)
Scan: Any = file_class(Album.scans)


def upload(content: bytes, filename: str) -> UploadFile:
    return UploadFile(io.BytesIO(content), filename=filename, headers=Headers({"content-type": "text/plain"}))


class TestAdding:
    async def test_with_a_new_parent(self, env: OrmEnvironment) -> None:
        await env.add(Album(id=1, photos=[named("a"), b"b", Photo(named("c"), caption="third", extra={"likes": 3})]))
        assert await shown(env) == "abc"
        async with env.sessions() as session:
            found = await load(session)
            photos = found.photos
            assert [(photo.caption, photo.extra) for photo in photos] == [(None, None), (None, None), ("third", {"likes": 3})]
            assert [photo.file.original_filename for photo in photos] == ["a.txt", None, "c.txt"]
            assert [photo.parent_id for photo in photos] == [1, 1, 1]
            upper = photos[0].file.variants["upper"]
            assert await env.manager.get(upper.ref) == UPPER.result(b"a")

    async def test_at_every_place(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "bd"))
        async with env.sessions.begin() as session:
            found = await load(session)
            photos = found.photos
            photos.insert(0, named("a"))
            photos.insert(2, named("c"))
            photos.insert(99, named("f"))
            photos.insert(-1, named("e"))
            photos.append(b"g")
            photos += [b"h"]
            assert [(await photo.file.read()).decode() for photo in photos if not photo.file.is_pending] == ["b", "d"]
        assert await shown(env) == "abcdefgh"

    async def test_uploads_of_a_form(self, env: OrmEnvironment) -> None:
        """An input that was left empty is sent as a file without a name and bytes, and is no file."""
        await env.add(album())
        async with env.sessions.begin() as session:
            found = await load(session)
            photos = found.photos
            photos.extend([upload(b"a", "a.txt"), upload(b"", ""), "", named("b"), io.BytesIO(b"c")])
            with pytest.raises(EmptyUploadError):
                photos.append(upload(b"", ""))
        assert await shown(env) == "abc"
        async with env.sessions() as session:
            file = (await load(session)).photos[0].file
            assert (file.original_filename, file.content_type) == ("a.txt", "text/plain")

    @pytest.mark.parametrize("value", ["text", None, 3, {"backend": "store"}, Scan(b"x")])
    async def test_nothing_else(self, env: OrmEnvironment, value: Any) -> None:
        found = album()
        for add in (found.photos.append, lambda it: found.photos.extend([it]), lambda it: setattr(found, "photos", [it])):
            if value is not None or add == found.photos.append:
                with pytest.raises(TypeError):
                    add(value)
        ref = StoredObjectRef(storage_key="docs", backend="store", location="a/b", size=1, checksum="sha256:" + "0" * 64)
        with pytest.raises(TypeError):
            found.photos.append(ref)  # type: ignore[arg-type]
        assert not found.photos

    async def test_without_loading(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "ab"))
        async with env.sessions.begin() as session:
            found = await session.get_one(Album, 1)
            rows = append_files(found, Album.photos, [named("c"), upload(b"", ""), Photo(b"d", caption="d")])
            assert "photos" not in vars(found)
            await session.flush()
            append_files(found, Album.photos, [b"e"])
            assert "photos" not in vars(found)
            assert [row.caption for row in rows] == [None, "d"]
        assert await shown(env) == "abcde"

    async def test_without_loading_and_loaded_later(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "ab"))
        async with env.sessions() as session, session.begin():
            found = await session.get_one(Album, 1)
            append_files(found, Album.photos, [b"c"])
            await session.refresh(found, ["photos"])
            append_files(found, Album.photos, [b"d"])
            assert len(found.photos) == 4
        assert await shown(env) == "abcd"

    async def test_to_a_new_and_to_a_detached_parent(self, env: OrmEnvironment) -> None:
        found = album()
        append_files(found, Album.photos, [b"a"])
        await env.add(found)
        with pytest.raises(DetachedInstanceError, match="is in no session"):
            append_files(found, Album.photos, [b"b"])
        assert await shown(env) == "a"

    async def test_by_the_foreign_key(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "a"))
        await env.add(Photo(named("b"), parent_id=1))
        assert await shown(env) == "ab"
        with pytest.raises(TypeError, match="no attribute 'parrent_id'"):
            Photo(named("c"), parrent_id=1)

    async def test_failed_upload(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "a"))
        env.backend.fail("put_bytes", nth=4, error=BackendUnavailableError("down"))
        with pytest.raises(BackendUnavailableError):
            async with env.sessions.begin() as session:
                found = await load(session)
                found.photos.extend(map(named, "bcd"))
        assert await shown(env) == "a"


class TestOrder:
    async def test_moves(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "abcdef"))
        for index, place, expected in [(5, 0, "fabcde"), (0, 5, "abcdef"), (1, 3, "acdbef"), (3, 1, "abcdef"), (2, -1, "abdefc")]:
            async with env.sessions.begin() as session:
                found = await load(session)
                photos = found.photos
                photos.move(photos[index], place)
                assert len(session.dirty) == 1
            assert await shown(env) == expected

    async def test_of_primary_keys(self, env: OrmEnvironment) -> None:
        """As a page sends them after a drag: files that it does not know follow, and those that are gone are ignored."""
        await env.add(album(1, "abcde"))
        async with env.sessions.begin() as session:
            found = await load(session)
            photos = found.photos
            a, b, _, d, _ = (photo.id for photo in photos)
            photos.reorder([d, 999_999, b, a])
        assert await shown(env) == "dbace"
        async with env.sessions.begin() as session:
            found = await load(session)
            found.photos.reorder([str(a), "", "-1", f"{d}"])  # of a form
        assert await shown(env) == "adbce"

    async def test_sorts(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "cab"))
        async with env.sessions.begin() as session:
            found = await load(session)
            found.photos.sort(key=lambda photo: photo.file.original_filename)
        assert await shown(env) == "abc"
        async with env.sessions.begin() as session:
            found = await load(session)
            found.photos.reverse()
        assert await shown(env) == "cba"

    async def test_not_in_the_list(self, env: OrmEnvironment) -> None:
        one, other = album(1, "a"), album(2, "b")
        with pytest.raises(ValueError, match="is not in the list"):
            one.photos.move(other.photos[0], 0)

    async def test_assignment(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "abcd"))
        async with env.sessions.begin() as session:
            found = await load(session)
            a, b, _, d = found.photos
            found.photos = [d, named("x"), a, b, named("y")]
            kept = a.file.ref, d.file.ref
        assert await shown(env) == "dxaby"
        async with env.sessions() as session:
            found = await load(session)
            photos = found.photos
            assert (photos[2].file.ref, photos[0].file.ref) == kept

    async def test_many_times_at_one_place(self, env: OrmEnvironment) -> None:
        """Neighbours get new keys where there is no room, so that keys never grow."""
        await env.add(album(1, "az"))
        letters = [chr(ord("b") + number % 24) for number in range(60)]
        async with env.sessions.begin() as session:
            found = await load(session)
            photos = found.photos
            for letter in letters:
                photos.insert(1, named(letter))
                await session.flush()
        assert await shown(env) == "a" + "".join(reversed(letters)) + "z"
        async with env.sessions() as session:
            positions = list(await session.scalars(select(Photo.position).order_by(Photo.position, Photo.id)))
            assert len(set(positions)) == 62
            assert max(positions) < 1 << 62

    async def test_equal_keys(self, env: OrmEnvironment) -> None:
        """Two transactions may give the same key: the primary key decides, and between two such there is room as well."""
        await env.add(album(1, "abc"))
        await env.sql("UPDATE album_photos SET position = 7")
        assert await shown(env) == "abc"
        async with env.sessions.begin() as session:
            found = await load(session)
            found.photos.insert(2, named("x"))
        assert await shown(env) == "abxc"
        await env.sql("UPDATE album_photos SET position = 7")
        async with env.sessions.begin() as session:
            found = await load(session)
            found.photos.reverse()
        assert await shown(env) == "xcba"

    async def test_other_order_of_a_query(self, env: OrmEnvironment) -> None:
        """What a query loads in an order of its own is not moved."""
        await env.add(album(1, "abc"))
        async with env.sessions.begin() as session:
            files = await session.scalars(select(Photo).order_by(Photo.id.desc()))
            assert [(await photo.file.read()).decode() for photo in files] == ["c", "b", "a"]
        assert await shown(env) == "abc"

    @pytest.mark.parametrize("number", range(3))
    async def test_like_any_list(self, env: OrmEnvironment, number: int) -> None:
        """Random operations do the same as to a list of letters."""
        rng = random.Random(seed() + number)
        await env.add(album())
        expected: list[str] = []
        for _ in range(repetitions("GRANITE_COLLECTION_STEPS", default=4, exhaustive=40)):
            async with env.sessions.begin() as session:
                found = await load(session)
                for _ in range(rng.randrange(1, 5)):
                    _change(rng, found, expected)
            assert await shown(env) == "".join(expected)


def _change(rng: random.Random, found: Any, expected: list[str]) -> None:
    photos, size, letter = found.photos, len(expected), rng.choice("abcdefghijklmnopqrstuvwxyz")
    index = rng.randrange(size) if size else 0
    match rng.randrange(11 if size else 3):
        case 0:
            photos.append(named(letter))
            expected.append(letter)
        case 1:
            photos.insert(index, named(letter))
            expected.insert(index, letter)
        case 2:
            photos[index:index] = [named(letter), named("x")]
            expected[index:index] = [letter, "x"]
        case 3:
            place = rng.randrange(size)
            photos.move(photos[index], place)
            expected.insert(place, expected.pop(index))
        case 4:
            photos.pop(index)
            expected.pop(index)
        case 5:
            photos[index] = named(letter)
            expected[index] = letter
        case 6:
            photos.reverse()
            expected.reverse()
        case 7:
            photos.insert(0, photos.pop(index))
            expected.insert(0, expected.pop(index))
        case 8:
            photos[index].file = named(letter)
            expected[index] = letter
        case 9:
            del photos[index : index + 2]
            del expected[index : index + 2]
        case 10:
            order = list(range(size))
            rng.shuffle(order)
            files = list(photos)
            found.photos = [files[place] for place in order]
            expected[:] = [expected[place] for place in order]


class TestRemoving:
    async def test_each_way(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "abcdefg"))
        async with env.sessions.begin() as session:
            found = await load(session)
            photos = found.photos
            photos.pop()
            photos.pop(0)
            photos.remove(photos[1])
            del photos[:2]
            await session.flush()
            assert len(await env.objects()) == 14  # with a variant each, until the commit
            await session.delete(photos[0])
        assert await shown(env) == "f"
        async with env.sessions.begin() as session:
            found = await load(session)
            found.photos.clear()
        assert await shown(env) == ""
        await env.recover()
        assert await env.objects() == set()

    async def test_replacement_displaces_one_object(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "abc"))
        before = await env.objects()
        async with env.sessions.begin() as session:
            found = await load(session)
            found.photos[1].file = named("x")
        assert await shown(env) == "axc"
        await env.recover()
        after = await env.objects()
        assert (len(before - after), len(after - before)) == (2, 2)  # the file and its variant
        async with env.sessions.begin() as session:
            found = await load(session)
            photos = found.photos
            identity = photos[1].id
            photos[1] = named("y")
            await session.flush()
            assert photos[1].id != identity
        assert await shown(env) == "ayc"

    async def test_ids_are_not_used_again(self, env: OrmEnvironment) -> None:
        """A page that still shows a file which was deleted does not name another one by its id."""
        await env.add(album(1, "ab"))
        async with env.sessions.begin() as session:
            found = await load(session)
            deleted = found.photos.pop().id
        async with env.sessions.begin() as session:
            found = await load(session)
            found.photos.append(named("c"))
            await session.flush()
            assert found.photos[1].id > deleted

    async def test_no_file(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "ab"))
        with pytest.raises(IntegrityError):
            async with env.sessions.begin() as session:
                found = await load(session)
                found.photos[0].file = None
        assert await shown(env) == "ab"


class TestParents:
    @pytest.mark.parametrize("is_loaded", [True, False])
    async def test_deleted(self, env: OrmEnvironment, is_loaded: bool) -> None:
        await env.add(album(1, "abc"), album(2, "x"))
        async with env.sessions.begin() as session:
            await session.delete(await load(session) if is_loaded else await session.get_one(Album, 1))
        await env.recover()
        assert len(await env.objects()) == 2
        assert await shown(env, key=2) == "x"

    async def test_deleted_without_foreign_keys_of_the_database(self, env: OrmEnvironment) -> None:
        await env.no_foreign_keys()
        await env.add(album(1, "abc"))
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Album, 1))
        await env.recover()
        async with env.sessions() as session:
            assert await session.scalar(select(func.count()).select_from(Photo)) == 0
        assert await env.objects() == set()

    async def test_bulk_statements(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "abc"), album(2, "xyz"), album(3, "k"))
        async with env.sessions.begin() as session:
            await session.execute(delete(Album).where(Album.id == 1))
            await session.execute(
                delete(Photo).where(Photo.parent_id == 2, Photo.file["original_filename"].as_string() == "y.txt")
            )
        assert await shown(env, key=2) == "xz"
        await env.recover()
        assert len(await env.objects()) == 6

    async def test_moved_to_another(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "abc"), album(2, "xyz"))
        before = await env.objects()
        async with env.sessions.begin() as session:
            one, two = await load(session), await load(session, key=2)
            two.photos.insert(1, one.photos.pop(1))
            two.photos.append(one.photos[0])  # which SQLAlchemy takes out of the other list
            assert len(one.photos) == 1
        assert (await shown(env), await shown(env, key=2)) == ("c", "xbyza")
        assert await env.objects() == before

    async def test_moved_while_its_parent_is_deleted(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "abc"), album(2, "x"))
        async with env.sessions.begin() as session:
            one, two = await load(session), await load(session, key=2)
            two.photos.append(one.photos[0])
            await session.delete(one)
        assert await shown(env, key=2) == "xa"
        await env.recover()
        assert len(await env.objects()) == 4

    async def test_copied(self, env: OrmEnvironment) -> None:
        await env.add(Album(id=1, photos=[Photo(named("a"), caption="first"), named("b")]))
        async with env.sessions.begin() as session:
            one = await load(session)
            session.add(Album(id=2, photos=[photo.copy() for photo in one.photos], scans=[photo.file for photo in one.photos]))
        assert (await shown(env), await shown(env, key=2), await shown(env, key=2, name="scans")) == ("ab", "ab", "ab")
        async with env.sessions() as session:
            assert (await load(session, key=2)).photos[0].caption == "first"
        assert len(await env.objects()) == 10

    async def test_file_becomes_the_cover(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "ab"))
        async with env.sessions.begin() as session:
            found = await load(session)
            found.cover = found.photos.pop(0).file
        async with env.sessions() as session:
            found = await session.get_one(Album, 1)
            assert found.cover is not None
            assert await found.cover.read() == b"a"
        assert await shown(env) == "b"

    async def test_composite_primary_key(self, env: OrmEnvironment) -> None:
        await env.add(Series(owner="anna", number=1, pages=[b"a", b"b"]), Series(owner="anna", number=2, pages=[b"x"]))
        async with env.sessions.begin() as session:
            found = await load(session, Series, ("anna", 1), "pages")
            pages = found.pages
            pages.insert(0, b"c")
            other = await session.get_one(Series, ("anna", 2))
            append_files(other, Series.pages, [b"y"])
        assert await shown(env, Series, ("anna", 1), "pages") == "cab"
        assert await shown(env, Series, ("anna", 2), "pages") == "xy"
        async with env.sessions.begin() as session:
            counts = select(Series.number, count_files(Series.pages), sum_sizes(Series.pages)).order_by(Series.number)
            assert [tuple(row) for row in await session.execute(counts)] == [(1, 3, 3), (2, 2, 2)]
            await session.execute(delete(Series).where(Series.number == 1))


class TestRollback:
    async def test_of_everything(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "abc"), album(2, "x"))
        async with env.sessions() as session:
            one, two = await load(session), await load(session, key=2)
            one.photos.insert(1, named("d"))
            two.photos.append(one.photos.pop(0))
            one.photos.move(one.photos[2], 0)
            one.photos[1].file = named("e")
            await session.flush()
            one.photos.pop()
            append_files(two, Album.photos, [b"f"])
            await session.flush()
            await session.rollback()
        assert (await shown(env), await shown(env, key=2)) == ("abc", "x")

    async def test_of_a_savepoint(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "abc"))
        async with env.sessions.begin() as session:
            found = await load(session)
            found.photos.append(named("d"))
            with pytest.raises(KeyError):
                async with session.begin_nested():
                    found.photos.reverse()
                    found.photos[0].file = named("x")
                    found.photos.pop()
                    await session.flush()
                    raise KeyError
            await session.refresh(found, ["photos"])
            found.photos.insert(0, named("e"))
        assert await shown(env) == "eabcd"

    async def test_used_again(self, env: OrmEnvironment) -> None:
        """After a rollback the same attachments can be flushed once more."""
        await env.add(album())
        files = [named("a"), named("b")]
        async with env.sessions() as session:
            found = await load(session)
            found.photos.extend(files)
            await session.flush()
            await session.rollback()
        async with env.sessions.begin() as session:
            found = await load(session)
            found.photos.extend(files)
        assert await shown(env) == "ab"


class TestReading:
    async def test_in_one_query(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "ab"), album(2, "c"), album(3))
        async with env.sessions() as session:
            rows = await session.execute(select(Album).options(joinedload(Album.photos)).order_by(Album.id))
            albums = rows.unique().scalars().all()
            assert [len(found.photos) for found in albums] == [2, 1, 0]
            assert all(isinstance(found.photos, AttachmentList) for found in albums)
            assert [photo.file.original_filename for photo in albums[0].photos] == ["a.txt", "b.txt"]

    async def test_without_asking(self, env: OrmEnvironment) -> None:
        """`lazy="selectin"` loads them with every parent."""
        await env.add(Album(id=1, scans=[b"a", b"b"]))
        async with env.sessions() as session:
            assert len((await session.get_one(Album, 1)).scans) == 2

    async def test_counts(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "ab"), Album(id=2, photos=[b"12345"]), album(3))
        async with env.sessions() as session:
            one = select(count_files(Album.photos)).where(Album.id == 1)
            assert await session.scalar(one) == 2
            counts = select(Album.id, count_files(Album.photos), sum_sizes(Album.photos)).order_by(Album.id)
            assert [tuple(row) for row in await session.execute(counts)] == [(1, 2, 2), (2, 1, 5), (3, 0, 0)]
            other = aliased(Album)
            full = select(other.id).where(count_files(other.photos) > 1)
            assert list(await session.scalars(full)) == [1]

    async def test_queries_of_files(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "ab"), album(2, "b"))
        async with env.sessions() as session:
            found = (
                select(Photo.parent_id).where(Photo.file["original_filename"].as_string() == "b.txt").order_by(Photo.parent_id)
            )
            assert list(await session.scalars(found)) == [1, 2]
            albums = select(Album.id).where(Album.photos.any(Photo.file["original_filename"].as_string() == "a.txt"))
            assert list(await session.scalars(albums)) == [1]

    async def test_pickles(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "ab"))
        async with env.sessions() as session:
            found = await load(session)
        again = pickle.loads(pickle.dumps(found))  # noqa: S301  # our own
        assert [await photo.file.read() for photo in again.photos] == [b"a", b"b"]
        assert type(again.photos[0]) is Photo
        async with env.sessions.begin() as session:
            session.add(again)
            again.photos.move(again.photos[1], 0)
        assert await shown(env) == "ba"

    async def test_merged(self, env: OrmEnvironment) -> None:
        await env.add(album(1, "ab"))
        async with env.sessions() as session:
            found = await load(session)
        found.photos.reverse()
        async with env.sessions.begin() as session:
            await session.merge(found, options=[])
        assert await shown(env) == "ba"

    async def test_collected_and_verified(self, env: OrmEnvironment) -> None:
        """The generated table is one of the models': no tool has to be told of it."""
        await env.add(album(1, "abc"))
        collector = StorageGarbageCollector(env.manager, binding=env.binding, grace_period=timedelta(0))
        report = await collector.collect(storage_key="docs", dry_run=False)
        assert (report.referenced, report.deleted) == (6, 0)
        checked = await verify(env.binding, deep=True)
        assert (checked.checked, len(checked.findings)) == (6, 0)

    def test_where_it_is_found(self) -> None:
        assert Photo.__name__ == "AlbumPhotosFile"
        assert Album.AlbumPhotosFile is Photo  # type: ignore[attr-defined]
        assert "AlbumPhotosFile" in Base.registry._class_registry
        assert {"album_photos", "album_scans", "series_pages"} <= set(Base.metadata.tables)
        with pytest.raises(TypeError, match="attachments\\(\\) declares"):
            file_class(Album.title)  # type: ignore[arg-type]
