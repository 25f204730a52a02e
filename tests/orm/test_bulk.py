"""Statements that hit many rows at once, without the session's instances."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import bindparam, delete, exists, func, insert, null, select, text, update
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import Session, aliased

from granite_storage.exceptions import InvalidReferenceError
from tests.orm.clones import cloned
from tests.orm.environment import Child, Doc, Item, Node, Note, OrmEnvironment, Parent, Photo, Report, Tag, file

SYNCHRONIZE = [False, "fetch", "evaluate", "auto"]


async def three(env: OrmEnvironment) -> None:
    await env.add(*(Doc(id=number, code=str(number), file=file(str(number)), other=file(f"o{number}")) for number in (1, 2, 3)))


class TestDelete:
    @pytest.mark.case("DBF-09")
    @pytest.mark.parametrize("how", SYNCHRONIZE)
    async def test_every_synchronize_session(self, env: OrmEnvironment, how: Any) -> None:
        await three(env)
        async with env.sessions.begin() as session:
            await session.get_one(Doc, 1)
            await session.execute(delete(Doc).where(Doc.id < 3), execution_options={"synchronize_session": how})
        await env.check(file_3="3", other_3="o3")

    @pytest.mark.case("DBF-09")
    async def test_query(self, env: OrmEnvironment) -> None:
        await three(env)
        async with env.sessions.begin() as session:
            await session.run_sync(lambda sync: sync.query(Doc).filter(Doc.id == 1).delete())
        await env.check(file_2="2", other_2="o2", file_3="3", other_3="o3")

    async def test_table(self, env: OrmEnvironment) -> None:
        await three(env)
        async with env.sessions.begin() as session:
            await session.execute(Doc.__table__.delete().where(Doc.__table__.c.id != 2))
        await env.check(file_2="2", other_2="o2")

    async def test_statement_that_a_select_reads_from(self, env: OrmEnvironment) -> None:
        """SQLAlchemy's way to get instances from RETURNING."""
        if env.database.name == "mariadb":
            pytest.skip("MariaDB has no UPDATE ... RETURNING")
        await three(env)
        async with env.sessions.begin() as session:
            deleted = delete(Doc).where(Doc.id == 1).returning(Doc)
            assert len((await session.scalars(select(Doc).from_statement(deleted))).all()) == 1
            updated = update(Doc).where(Doc.id == 2).values(file=None).returning(Doc)
            (doc,) = await session.scalars(select(Doc).from_statement(updated))
            assert doc.file is None
        await env.check(other_2="o2", file_3="3", other_3="o3")

    async def test_all_and_rolled_back(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            await session.execute(delete(Doc))
            await session.rollback()
        await env.check(file_1="a")

    async def test_returning(self, env: OrmEnvironment) -> None:
        await three(env)
        async with env.sessions.begin() as session:
            result = await session.execute(delete(Doc).where(Doc.id == 1).returning(Doc.id, Doc.file))
            number, stored = result.one()
            assert (number, await stored.read()) == (1, b"1")
        await env.check(file_2="2", other_2="o2", file_3="3", other_3="o3")

    async def test_parameters(self, env: OrmEnvironment) -> None:
        await three(env)
        async with env.sessions.begin() as session:
            await session.execute(delete(Doc).where(Doc.id == bindparam("which")), {"which": 1})
        await env.check(file_2="2", other_2="o2", file_3="3", other_3="o3")

    async def test_several_sets_of_parameters(self, env: OrmEnvironment) -> None:
        await three(env)
        table = Doc.__table__
        async with env.sessions.begin() as session:
            await session.execute(table.delete().where(table.c.id == bindparam("which")), [{"which": 1}, {"which": 3}])
        await env.check(file_2="2", other_2="o2")

    async def test_subquery(self, env: OrmEnvironment) -> None:
        await env.add(Parent(id=1, children=[Child(id=1, file=file("c"))]), Child(id=2, file=file("d")))
        async with env.sessions.begin() as session:
            await session.execute(delete(Child).where(exists().where(Parent.id == Child.parent_id)))
        assert list((await env.contents()).values()) == [b"d"]

    async def test_where_a_ref_is(self, env: OrmEnvironment) -> None:
        if env.database.is_sqlite or env.database.name == "mariadb":
            pytest.skip("JSON is compared by value on PostgreSQL only")
        await three(env)
        async with env.sessions.begin() as session:
            stored = (await session.get_one(Doc, 1)).file
            await session.execute(delete(Doc).where(Doc.file == stored), execution_options={"synchronize_session": False})
        await env.check(file_2="2", other_2="o2", file_3="3", other_3="o3")

    async def test_flushes_first(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).file = file("b")
            session.add(Doc(id=2, file=file("c")))
            await session.execute(delete(Doc))
        await env.check()
        assert await env.objects() == set()

    @pytest.mark.case("DBF-09")
    async def test_cascade(self, env: OrmEnvironment) -> None:
        await env.add(
            Parent(id=1, file=file("p"), children=[Child(id=1, file=file("c"), tags=[Tag(id=1, file=file("t"))])]),
            Child(id=2, file=file("d"), tags=[Tag(id=2, file=file("u"))]),
        )
        async with env.sessions.begin() as session:
            await session.execute(delete(Parent))
        assert sorted((await env.contents()).values()) == [b"d", b"u"]

    async def test_cascade_into_itself(self, env: OrmEnvironment) -> None:
        await env.add(Node(id=1, file=file("1")))
        await env.add(Node(id=2, parent_id=1, file=file("2")))
        await env.add(Node(id=3, parent_id=2, file=file("3")), Node(id=4, parent_id=2))
        await env.add(Node(id=5, parent_id=4, file=file("5")), Node(id=6, file=file("6")))
        async with env.sessions.begin() as session:
            await session.execute(delete(Node).where(Node.id == 1))
        assert await env.contents() == {("node", 6, "file"): b"6"}

    async def test_round_of_cascades(self, env: OrmEnvironment) -> None:
        await env.add(Node(id=1, file=file("1")))
        await env.add(Node(id=2, parent_id=1, file=file("2")))
        await env.sql("UPDATE node SET parent_id = 2 WHERE id = 1")
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Node, 2))
        await env.check()
        assert await env.objects() == set()

    async def test_cascade_that_the_database_does_not_do(self, env: OrmEnvironment) -> None:
        if not env.database.is_sqlite:
            pytest.skip("only SQLite may be told to check no foreign keys")
        await env.no_foreign_keys()
        await env.add(Node(id=1, file=file("1")), Node(id=2, parent_id=1, file=file("2")))
        async with env.sessions.begin() as session:
            await session.execute(delete(Node).where(Node.id == 1))
        assert await env.contents() == {("node", 2, "file"): b"2"}
        async with env.sessions.begin() as session:
            session.add(Node(id=1, file=file("1")))
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Node, 1))
        assert await env.contents() == {("node", 2, "file"): b"2"}

    async def test_file_that_a_cascade_has_left_is_copied(self, env: OrmEnvironment) -> None:
        """The row still holds its object, so that another row of the transaction cannot take it over."""
        if not env.database.is_sqlite:
            pytest.skip("only SQLite may be told to check no foreign keys")
        await env.no_foreign_keys()
        await env.add(Node(id=1, file=file("1")), Node(id=2, parent_id=1, file=file("2")))
        async with env.sessions.begin() as session:
            await session.execute(delete(Node).where(Node.id == 1))
            session.add(Node(id=3, file=(await session.get_one(Node, 2)).file))
        assert await env.contents() == {("node", 2, "file"): b"2", ("node", 3, "file"): b"2"}
        await env.check()

    async def test_inheritance(self, env: OrmEnvironment) -> None:
        await env.add(
            Item(id=1, file=file("i")), Photo(id=2, file=file("p"), raw=file("w")), Report(id=3, file=file("r"), pdf=file("x"))
        )
        async with env.sessions.begin() as session:
            await session.execute(delete(Photo))
        assert sorted((await env.contents()).values()) == [b"i", b"r", b"x"]
        async with env.sessions.begin() as session:
            await session.execute(delete(Item).where(Item.id == 3))
        assert sorted((await env.contents()).values()) == [b"i"]

    async def test_many_rows(self, env: OrmEnvironment) -> None:
        await env.add(*(Doc(id=number, file=file("x")) for number in range(1, 451)))
        async with env.sessions.begin() as session:
            await session.execute(delete(Doc).where(Doc.id > 1))
        await env.check(file_1="x")


class TestUpdate:
    @pytest.mark.parametrize("how", SYNCHRONIZE)
    @pytest.mark.parametrize("value", [None, null()])
    async def test_to_none(self, env: OrmEnvironment, how: Any, value: Any) -> None:
        await three(env)
        async with env.sessions.begin() as session:
            await session.get_one(Doc, 1)
            statement = update(Doc).where(Doc.id < 3).values(file=value)
            await session.execute(statement, execution_options={"synchronize_session": how})
        await env.check(other_1="o1", other_2="o2", file_3="3", other_3="o3")

    async def test_by_a_list_of_keys(self, env: OrmEnvironment) -> None:
        await three(env)
        async with env.sessions.begin() as session:
            await session.execute(update(Doc), [{"id": 1, "file": None}, {"id": 3, "file": None, "title": "x"}])
        await env.check(other_1="o1", file_2="2", other_2="o2", other_3="o3")

    async def test_by_a_list_of_keys_and_the_names_of_attributes(self, env: OrmEnvironment) -> None:
        await env.add(Note(id=1, scan=file("a")), Note(id=2, scan=file("b")))
        async with env.sessions.begin() as session:
            await session.execute(update(Note), [{"id": 1, "scan": None}])
        assert await env.contents() == {("note", 2, "scan_ref"): b"b"}

    async def test_attribute_of_another_name(self, env: OrmEnvironment) -> None:
        await env.add(Note(id=1, scan=file("a")), Note(id=2, scan=file("b")))
        async with env.sessions.begin() as session:
            await session.execute(update(Note).where(Note.id == 1).values(scan=None))
        async with env.sessions.begin() as session:
            await session.execute(update(Note).where(Note.id == 2).values({Note.scan: None}))
        await env.check()
        assert await env.objects() == set()

    async def test_list_of_keys_of_a_joined_class(self, env: OrmEnvironment) -> None:
        await env.add(Report(id=1, file=file("a"), pdf=file("b")))
        async with env.sessions.begin() as session:
            await session.execute(update(Report), [{"id": 1, "file": None, "pdf": None}])
        await env.check()
        assert await env.objects() == set()

    async def test_query(self, env: OrmEnvironment) -> None:
        await three(env)
        async with env.sessions.begin() as session:
            await session.run_sync(lambda sync: sync.query(Doc).filter(Doc.id == 1).update({"file": None}))
        await env.check(other_1="o1", file_2="2", other_2="o2", file_3="3", other_3="o3")

    async def test_single_table_inheritance_hits_its_class_only(self, env: OrmEnvironment) -> None:
        await env.add(Item(id=1, file=file("i")), Photo(id=2, file=file("p")))
        async with env.sessions.begin() as session:
            await session.execute(update(Photo).values(file=None))
        assert await env.contents() == {("item", 1, "file"): b"i"}

    async def test_of_other_columns(self, env: OrmEnvironment) -> None:
        await three(env)
        async with env.sessions.begin() as session:
            await session.execute(update(Doc).values(title=func.lower("X")))
            await session.execute(update(Doc).where(Doc.file.is_not(None)).values(title="y"))
        await env.check(**{f"{column}_{n}": f"{o}{n}" for n in (1, 2, 3) for column, o in (("file", ""), ("other", "o"))})

    async def test_taken_back_in_the_same_transaction(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await session.get_one(Doc, 1)
            old = doc.file
            await session.execute(update(Doc).values(file=None))
            assert doc.file is None
            doc.file = old
        await env.check(file_1="a")


def values_of(stored: Any) -> dict[str, Any]:
    return {
        "attachment": stored,
        "pending": file("x"),
        "ref": stored.ref,
        "dict": stored.ref.to_dict(),
        "text": "x",
        "column": Doc.other,
        "alias": aliased(Doc).file,
        "subquery": select(Doc.other).where(Doc.id == 1).scalar_subquery(),
    }


def mariadb_upserts(value: str) -> list[Any]:
    """Each form in which `ON DUPLICATE KEY UPDATE` takes its values."""
    upsert = mysql.insert(Doc).values(id=1, title="x")
    new = {"another column": Doc.other, "the refused one": upsert.inserted.other, "none": None}[value]
    return [
        upsert.on_duplicate_key_update(file=new),
        upsert.on_duplicate_key_update({"file": new}),
        upsert.on_duplicate_key_update([("title", "y"), ("file", new)]),
    ]


@pytest.mark.case("DBF-10")
class TestRefusals:
    """What would write a ref past the hooks: two rows would hold one object, or a row one that nobody stored."""

    @pytest.fixture
    async def stored(self, env: OrmEnvironment) -> Any:
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        async with env.sessions() as session:
            return (await session.get_one(Doc, 1)).file

    @pytest.mark.parametrize("kind", ["attachment", "pending", "ref", "dict", "text", "column", "alias", "subquery"])
    async def test_values(self, env: OrmEnvironment, stored: Any, kind: str) -> None:
        value = values_of(stored)[kind]
        for statement in (
            update(Doc).where(Doc.id == 1).values(file=value),
            update(Doc).where(Doc.id == 1).values({Doc.file: value}),
            insert(Doc).values(id=2, file=value),
            insert(Doc).values([{"id": 2, "file": value}]),
            update(Doc.__table__).values(file=value),
            update(Note).values(scan=value),
        ):
            await self.refused(env, statement)
        await env.check(file_1="a", other_1="b")

    async def refused(self, env: OrmEnvironment, statement: Any, parameters: Any = None) -> None:
        async with env.sessions() as session:
            with pytest.raises(InvalidReferenceError):
                await session.execute(statement, parameters)

    async def test_statement_that_a_select_reads_from(self, env: OrmEnvironment, stored: Any) -> None:
        for statement in (insert(Doc).values(id=2, file=stored), update(Doc).values(file=Doc.other)):
            await self.refused(env, select(Doc).from_statement(statement.returning(Doc)))
        await env.check(file_1="a", other_1="b")

    async def test_ordered_values(self, env: OrmEnvironment, stored: Any) -> None:
        await self.refused(env, update(Doc).ordered_values((Doc.title, "x"), (Doc.file, Doc.other)))
        await env.check(file_1="a", other_1="b")

    async def test_parameters(self, env: OrmEnvironment, stored: Any) -> None:
        await self.refused(env, insert(Doc), [{"id": 2, "file": stored}])
        await self.refused(env, update(Doc), [{"id": 1, "other": stored}])
        await self.refused(env, insert(Doc), {"id": 2, "file": file("x")})
        await self.refused(env, update(Doc).where(Doc.id == 1).values(file=bindparam("f")), {"f": stored})
        await env.check(file_1="a", other_1="b")

    async def test_from_select(self, env: OrmEnvironment, stored: Any) -> None:
        source = select(Doc.id + 1, Doc.file)
        await self.refused(env, insert(Doc).from_select(["id", "file"], source))
        await self.refused(env, insert(Doc).from_select([Doc.id, Doc.file], source))
        await self.refused(env, insert(Note).from_select([Note.id, Note.scan], source))
        await env.check(file_1="a", other_1="b")

    @pytest.mark.parametrize("value", ["another column", "the refused one", "none"])
    async def test_upsert(self, env: OrmEnvironment, stored: Any, value: str) -> None:
        if env.database.name == "mariadb":
            for statement in mariadb_upserts(value):
                await self.refused(env, statement)
        else:
            kind = sqlite if env.database.is_sqlite else postgresql
            upsert = kind.insert(Doc).values(id=1, title="x")
            new = {"another column": Doc.other, "the refused one": upsert.excluded.other, "none": None}[value]
            for name in ("file", Doc.file, Doc.__table__.c.file):
                await self.refused(env, upsert.on_conflict_do_update(index_elements=["id"], set_={name: new}))
        await env.check(file_1="a", other_1="b")

    async def test_upsert_of_other_columns(self, env: OrmEnvironment, stored: Any) -> None:
        kind: Any = mysql if env.database.name == "mariadb" else sqlite if env.database.is_sqlite else postgresql
        upsert = kind.insert(Doc).values(id=1, title="x", file=None)
        if kind is mysql:
            upsert = upsert.on_duplicate_key_update(title="new")
        else:
            upsert = upsert.on_conflict_do_update(index_elements=["id"], set_={"title": "new"})
        async with env.sessions.begin() as session:
            await session.execute(upsert)
        async with env.sessions() as session:
            assert (await session.get_one(Doc, 1)).title == "new"
        await env.check(file_1="a", other_1="b")

    @pytest.mark.parametrize("call", ["bulk_save_objects", "bulk_insert_mappings"])
    async def test_legacy_bulk(self, env: OrmEnvironment, call: str) -> None:
        def work(session: Session) -> None:
            if call == "bulk_save_objects":
                session.bulk_save_objects([Doc(id=2, file=file("x"))])
            else:
                session.bulk_insert_mappings(Doc, [{"id": 2, "file": file("x")}])

        async with env.sessions() as session:
            with pytest.raises(InvalidReferenceError):
                await session.run_sync(work)
        await env.check()

    async def test_connection(self, env: OrmEnvironment, stored: Any) -> None:
        async with env.engine.connect() as connection:
            for value in (stored, stored.ref, file("x")):
                with pytest.raises(InvalidReferenceError):
                    await connection.execute(insert(Doc.__table__).values(id=2, file=value))
        await env.check(file_1="a", other_1="b")

    async def test_what_a_flush_of_the_same_transaction_has_stored(self, env: OrmEnvironment, stored: Any) -> None:
        async with env.sessions.begin() as session:
            doc = Doc(id=2, file=file("c"))
            session.add(doc)
            await session.flush()
            connection = await session.connection()
            with pytest.raises(InvalidReferenceError):
                await connection.execute(insert(Doc.__table__).values(id=3, file=doc.file))
        await env.check(file_1="a", other_1="b", file_2="c")

    async def test_nothing_of_it_is_refused(self, env: OrmEnvironment, stored: Any) -> None:
        async with env.sessions.begin() as session:
            await session.execute(insert(Doc).values(id=2, title="x"))
            await session.execute(insert(Doc).values(id=3, file=None))
            await session.execute(insert(Doc), [{"id": 4, "file": None}, {"id": 5, "file": None}])
            await session.execute(insert(Doc.__table__).from_select(["id", "title"], select(Doc.id + 10, Doc.title)))
            await session.execute(select(Doc).where(Doc.file == stored))
        await env.check(file_1="a", other_1="b")


class TestAliases:
    """A statement writes to an alias of a table: no more rows are read and locked than it hits."""

    @pytest.mark.case("RE-03")
    @pytest.mark.parametrize("database", ["sqlite", "asyncpg"], indirect=True)
    @pytest.mark.filterwarnings("error::sqlalchemy.exc.SAWarning")
    async def test_delete(self, env: OrmEnvironment) -> None:
        await three(env)
        doc = aliased(Doc)
        async with env.sessions.begin() as session:
            await session.execute(delete(doc).where(doc.id == 1))
            await require_unlocked(env)
        await env.check(file_2="2", other_2="o2", file_3="3", other_3="o3")

    @pytest.mark.case("RE-03")
    @pytest.mark.parametrize("database", ["sqlite", "asyncpg", "mariadb"], indirect=True)
    @pytest.mark.filterwarnings("error::sqlalchemy.exc.SAWarning")
    async def test_update(self, env: OrmEnvironment) -> None:
        await three(env)
        doc = aliased(Doc)
        async with env.sessions.begin() as session:
            # On MariaDB SQLAlchemy's own SELECT, by which it synchronizes the session, forgets the alias.
            statement = update(doc).where(doc.id == 1).values(file=None)
            await session.execute(statement, execution_options={"synchronize_session": False})
            await require_unlocked(env)
        await env.check(other_1="o1", file_2="2", other_2="o2", file_3="3", other_3="o3")

    @pytest.mark.case("RE-03")
    @pytest.mark.parametrize("database", ["sqlite", "asyncpg"], indirect=True)
    async def test_table_beside_its_alias(self, env: OrmEnvironment) -> None:
        """The criteria name the table as well, for another row of it."""
        await three(env)
        doc = aliased(Doc)
        async with env.sessions.begin() as session:
            before = select(Doc.id).where(Doc.id == doc.id - 1)
            await session.execute(delete(doc).where(exists(before)))
        await env.check(file_1="1", other_1="o1")

    @pytest.mark.case("RE-03")
    @pytest.mark.parametrize("database", ["sqlite", "asyncpg"], indirect=True)
    async def test_table(self, env: OrmEnvironment) -> None:
        await three(env)
        doc = Doc.__table__.alias()
        async with env.sessions.begin() as session:
            await session.execute(delete(doc).where(doc.c.id < 3))
        await env.check(file_3="3", other_3="o3")

    @pytest.mark.case("RA-07")
    @pytest.mark.parametrize("database", ["sqlite", "asyncpg"], indirect=True)
    async def test_schema_of_the_statement(self, env: OrmEnvironment) -> None:
        """What a schema_translate_map of the statement's own leads to is displaced, under whatever name."""
        if env.journal is not None:
            pytest.skip("a journal's worker refuses a schema that has one of the models' tables only")
        await env.add(Doc(id=1, file=file("a")))
        doc = aliased(Doc)
        async with cloned(env) as schema:
            await env.sql("DELETE FROM doc" if env.database.is_postgres else "DELETE FROM main.doc")
            options = {"schema_translate_map": {None: schema}, "synchronize_session": False}
            async with env.sessions.begin() as session:
                await session.execute(delete(doc).where(doc.id == 1), execution_options=options)
            assert await env.objects() == set()


async def require_unlocked(env: OrmEnvironment) -> None:
    """Lock the rows that a statement does not hit, where a database has locks of rows."""
    if env.database.is_sqlite:
        return
    async with env.engine.begin() as connection:
        rows = await connection.execute(text("SELECT id FROM doc WHERE id > 1 FOR UPDATE NOWAIT"))
        assert len(rows.all()) == 2
