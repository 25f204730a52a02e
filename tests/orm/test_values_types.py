"""The column types: what they write, what they read, and what SQL may ask of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from sqlalchemy import Column, MetaData, Table, create_engine, func, select, text, type_coerce, union_all
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedColumn, mapped_column
from sqlalchemy.schema import CreateTable

from granite_storage import ConfigurationError, StorageManager, StoredObjectRef
from granite_storage.exceptions import InvalidReferenceError, UnboundAttachmentError
from granite_storage.orm import Attachment, AttachmentType, StorageBinding, StoredObjectRefType, attachment, bind_storage
from tests.orm.values import Base, Document, Receipt, Sessions, add, as_json, make_manager, read_raw, sqlite, write_raw

DEEP = "[" * 20_000 + "]" * 20_000
BROKEN = {
    "no JSON": "{broken",
    "not a mapping": '"documents"',
    "a list": "[1, 2]",
    "no location": '{"storage_key": "documents", "backend": "memory", "size": 3}',
    "a size that is text": '{"storage_key": "d", "backend": "m", "location": "x", "size": "3"}',
    "a checksum of another kind": '{"storage_key": "d", "backend": "m", "location": "x", "size": 3, "checksum": "md5:00"}',
    "nested absurdly": DEEP,
    "nested absurdly in extra": f'{{"storage_key": "d", "backend": "m", "location": "x", "size": 3, "extra": {DEEP}}}',
    "large": json.dumps({"storage_key": "d", "backend": "m", "location": "x", "size": 3, "extra": {"a": "x" * (5 << 20)}}),
    "a number beyond all sizes": "9" * 5000,
    "empty": "",
}


async def put(manager: StorageManager, content: bytes = b"content", **given: Any) -> StoredObjectRef:
    return await manager.put_bytes(
        storage_key="documents", model_name="receipt", entity_id="1", field_name="ref", content=content, **given
    )


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [(postgresql.dialect(), "JSONB"), (mysql.dialect(), "JSON"), (create_engine("sqlite://").dialect, "JSON")],
    ids=["postgresql", "mysql", "sqlite"],
)
def test_both_types_are_the_same_column_in_the_database(dialect: Any, expected: str) -> None:
    kinds = [StoredObjectRefType(), AttachmentType("documents")]
    made = [str(CreateTable(Table("t", MetaData(), Column("c", kind))).compile(dialect=dialect)) for kind in kinds]
    assert made[0] == made[1]
    assert f"c {expected}\n" in made[0]


async def test_none_is_null_and_never_the_json_null(sessions: Sessions, binding: StorageBinding) -> None:
    await add(sessions, Receipt(ref=None))
    await add(sessions, Document(file=None))
    assert await read_raw(sessions, "receipt.ref") is None
    assert await read_raw(sessions, "document.file") is None
    async with sessions() as session:
        assert await session.scalar(select(func.count()).where(Document.file.is_(None))) == 1
        assert await session.scalar(select(func.count()).where(Receipt.ref.is_(None))) == 1


async def test_a_json_null_of_other_origin_reads_as_none(sessions: Sessions, binding: StorageBinding) -> None:
    await add(sessions, Document())
    await write_raw(sessions, "null")
    async with sessions() as session:
        assert await session.scalar(select(Document.file)) is None


async def test_a_plain_column_holds_a_ref(sessions: Sessions, manager: StorageManager) -> None:
    ref = await put(manager, content_type="text/plain", original_filename="a.txt", extra={"tags": ["x"]})
    await add(sessions, Receipt(ref=ref))
    async with sessions() as session:
        receipt = await session.get_one(Receipt, 1)
        assert receipt.ref == ref
        assert receipt.ref is not None
        assert await manager.get(receipt.ref) == b"content"


@pytest.mark.parametrize("value", [{"location": "x"}, '{"location": "x"}', b"bytes", 3, Attachment(b"pending")], ids=str)
async def test_a_plain_column_takes_refs_only(sessions: Sessions, value: Any) -> None:
    with pytest.raises((InvalidReferenceError, UnboundAttachmentError)):
        await add(sessions, Receipt(ref=value))


@pytest.mark.case("REF-01")
async def test_an_old_ref_is_read_and_not_rewritten(sessions: Sessions, binding: StorageBinding) -> None:
    old = '{"storage_key": "documents", "backend": "memory", "location": "docs/a", "size": 3}'
    await add(sessions, Document())
    await write_raw(sessions, old)
    async with sessions.begin() as session:
        document = await session.get_one(Document, 1)
        assert document.file is not None
        assert (document.file.checksum, document.file.ref.created_at, document.file.ref.extra) == ("", None, None)
        document.title = "changed"
    assert await read_raw(sessions) == old


@pytest.mark.case("REF-03", "REF-06")
@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
async def test_a_broken_value_of_a_plain_column_raises_where_it_is_loaded(sessions: Sessions, raw: str) -> None:
    await add(sessions, Receipt())
    await write_raw(sessions, raw, "receipt.ref")
    async with sessions() as session:
        with pytest.raises(InvalidReferenceError):
            await session.scalars(select(Receipt))


@pytest.mark.case("REF-03", "REF-06")
@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
async def test_a_broken_attachment_raises_where_it_is_used_and_spoils_no_list(
    sessions: Sessions, binding: StorageBinding, raw: str
) -> None:
    async with sessions.begin() as session:
        session.add_all([Document(), Document(file=Attachment(b"good"))])
    await write_raw(sessions, raw)
    async with sessions.begin() as session:
        broken, good = [document.file for document in await session.scalars(select(Document).order_by(Document.id))]
        assert broken is not None
        assert good is not None
        assert await good.read() == b"good"
        assert not broken.is_pending
        assert "broken" in repr(broken)
        for use in ("ref", "size", "checksum", "location", "content_type", "original_filename"):
            with pytest.raises(InvalidReferenceError):
                getattr(broken, use)
        with pytest.raises(InvalidReferenceError):
            await broken.read()
        with pytest.raises(InvalidReferenceError):
            broken.open()
        with pytest.raises(InvalidReferenceError):
            await broken.exists()


async def test_a_broken_attachment_can_be_replaced(sessions: Sessions, binding: StorageBinding) -> None:
    await add(sessions, Document(file=Attachment(b"old")))
    await write_raw(sessions, "{broken")
    async with sessions.begin() as session:
        document = await session.get_one(Document, 1)
        document.file = Attachment(b"new")
    async with sessions() as session:
        file = await session.scalar(select(Document.file))
        assert file is not None
        assert await file.read() == b"new"


async def test_unknown_keys_survive(sessions: Sessions, manager: StorageManager) -> None:
    ref = await put(manager)
    await add(sessions, Receipt(ref=ref))
    await write_raw(sessions, as_json(ref, encryption={"key": 7}), "receipt.ref")
    async with sessions.begin() as session:
        loaded = (await session.get_one(Receipt, 1)).ref
        session.add(Receipt(id=2, ref=loaded))
    async with sessions() as session:
        raw = await session.scalar(text("SELECT ref FROM receipt WHERE id = 2"))
        assert json.loads(raw)["encryption"] == {"key": 7}


@pytest.mark.case("REF-12")
async def test_a_value_in_another_order_is_no_change(sessions: Sessions, manager: StorageManager) -> None:
    ref = await put(manager)
    await add(sessions, Receipt(ref=ref))
    reordered = json.dumps(dict(reversed(ref.to_dict().items())))
    await write_raw(sessions, reordered, "receipt.ref")
    async with sessions.begin() as session:
        receipt = await session.get_one(Receipt, 1)
        receipt.ref = ref
    assert await read_raw(sessions, "receipt.ref") == reordered


async def test_the_two_types_read_each_others_rows(sessions: Sessions, binding: StorageBinding, manager: StorageManager) -> None:
    document = await add(sessions, Document(file=Attachment(b"managed")))
    async with sessions.begin() as session:
        ref = await session.scalar(select(type_coerce(Document.file, StoredObjectRefType())))
        assert ref == document.file.ref
        session.add(Receipt(ref=ref))
    async with sessions() as session:
        as_attachment = await session.scalar(select(type_coerce(Receipt.ref, Document.file.type)))
        assert as_attachment is not None
        assert await as_attachment.read() == b"managed"
        both = select(Document.file).union_all(select(Receipt.ref))
        assert [item.location for item in await session.scalars(both)] == [ref.location] * 2


async def test_where(sessions: Sessions, binding: StorageBinding) -> None:
    one = await add(sessions, Document(file=Attachment(b"1", filename="one.txt")))
    two = await add(sessions, Document(file=Attachment(b"22", filename="two.txt", extra={"tags": ["a", "b"], "n": {"m": 1.5}})))
    await add(sessions, Document())
    ids = select(Document.id).order_by(Document.id)

    async def found(*criteria: Any) -> list[int]:
        async with sessions() as session:
            return list(await session.scalars(ids.where(*criteria)))

    assert await found(Document.file == one.file.ref) == [1]
    assert await found(Document.file == one.file) == [1]
    assert await found(Document.file != one.file) == [2]
    assert await found(Document.file.in_([one.file, two.file.ref])) == [1, 2]
    assert await found(Document.file.not_in([one.file])) == [2]
    assert await found(Document.file.in_([])) == []
    assert await found(Document.file.is_(None)) == [3]
    assert await found(Document.file == None) == [3]  # noqa: E711  # that is how SQLAlchemy says it
    assert await found(Document.file.is_not(None)) == [1, 2]
    assert await found(Document.file["size"].as_integer() > 1) == [2]
    assert await found(Document.file["original_filename"].as_string() == "one.txt") == [1]
    assert await found(Document.file["extra", "n", "m"].as_float() == 1.5) == [2]
    async with sessions() as session:
        assert list(await session.scalars(select(Document.file["extra"]["tags"]).where(Document.id == 2))) == [["a", "b"]]
        assert await session.scalar(select(func.sum(Document.file["size"].as_integer()))) == 3


async def test_equality_asks_where_the_object_is_not_how_the_json_is_written(sessions: Sessions, binding: StorageBinding) -> None:
    document = await add(sessions, Document(file=Attachment(b"1")))
    await write_raw(sessions, json.dumps(dict(reversed(document.file.ref.to_dict().items())), indent=2))
    async with sessions() as session:
        assert await session.scalar(select(Document.id).where(Document.file == document.file)) == 1


def test_a_pending_attachment_equals_no_row() -> None:
    assert str(Document.file == Attachment(b"")) == "false"


def test_equality_is_the_same_sql_on_every_database() -> None:
    ref = StoredObjectRef("documents", "memory", "docs/a", 1, "")
    for dialect in (postgresql.dialect(), mysql.dialect()):
        compiled = select(Document.id).where(Document.file == ref).compile(dialect=dialect)
        assert {"memory", "docs/a"} <= set(compiled.params.values())


async def test_statements_are_cached(sessions: Sessions, binding: StorageBinding) -> None:
    refs = [StoredObjectRef("documents", "memory", location, 1, "") for location in ("a", "b")]
    first, second = (select(Document).where(Document.file == ref)._generate_cache_key() for ref in refs)
    assert first is not None
    assert second is not None
    assert first.key == second.key


async def test_the_cache_keeps_the_columns_of_two_bases_apart(tmp_path: Path) -> None:
    """The same statement on the same engine, with the type of either column: each attachment has its own manager."""

    class Other(DeclarativeBase):
        pass

    class Copy(Other):
        __tablename__ = "document"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("documents")

    managers = {Document: make_manager(), Copy: make_manager()}
    bindings = [bind_storage(Base, managers[Document]), bind_storage(Other, managers[Copy])]
    async with sqlite(tmp_path) as sessions:
        await add(sessions, Document(file=Attachment(b"1")))
        async with sessions() as session:
            for model in (Document, Copy, Document):
                raw = text("SELECT file FROM document").columns(file=model.file.type)
                assert (await session.scalar(raw)).manager is managers[model]
    for binding in bindings:
        binding.unbind()


async def test_one_type_object_serves_several_columns(tmp_path: Path, manager: StorageManager) -> None:
    """A `type_annotation_map` gives the same object to each."""

    class Mapping(DeclarativeBase):
        type_annotation_map: ClassVar = {Attachment: AttachmentType("documents")}

    class Pair(Mapping):
        __tablename__ = "pair"
        id: Mapped[int] = mapped_column(primary_key=True)
        left: Mapped[Attachment | None]
        right: Mapped[Attachment | None]

    class Single(Mapping):
        __tablename__ = "single"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None]

    binding = bind_storage(Mapping, manager)
    async with sqlite(tmp_path, Mapping) as sessions:
        pair = await add(sessions, Pair(id=1, left=Attachment(b"l"), right=Attachment(b"r")))
        single = await add(sessions, Single(id=1, file=Attachment(b"s")))
        found = [item.location.rpartition("/")[0] for item in (pair.left, pair.right, single.file)]
        assert found == ["docs/pair/1/left", "docs/pair/1/right", "docs/single/1/file"]
    binding.unbind()


def test_columns_of_a_mixin_and_copied_tables_know_their_own_table() -> None:
    class Bases(DeclarativeBase):
        pass

    class HasFile:
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("documents")

    class Left(HasFile, Bases):
        __tablename__ = "left"

    class Right(HasFile, Bases):
        __tablename__ = "right"

    names = [model.__table__.c.file.type.label for model in (Left, Right)]
    assert names == ["left.file", "right.file"]
    copied = Left.__table__.to_metadata(MetaData(), name="copied")  # type: ignore[attr-defined]
    assert copied.c.file.type.label == "copied.file"
    assert Left.__table__.c.file.type.label == "left.file"


@pytest.mark.parametrize("key", ["", None, 3])
def test_an_attachment_column_needs_a_storage_key(key: Any) -> None:
    with pytest.raises(ConfigurationError, match="storage key"):
        attachment(key)


def test_a_type_without_a_column_says_so() -> None:
    kind = AttachmentType("documents")
    assert repr(kind) == "AttachmentType('documents')"
    with pytest.raises(ConfigurationError, match="belongs to no column"):
        _ = kind.column


def test_attachment_takes_what_mapped_column_takes() -> None:
    made = attachment("documents", nullable=False, deferred=True)
    assert isinstance(made, MappedColumn)
    assert not made.column.nullable


async def test_a_union_of_columns_of_two_policies(sessions: Sessions, binding: StorageBinding) -> None:
    await add(sessions, Document(file=Attachment(b"f"), thumbnail=Attachment(b"t")))
    async with sessions() as session:
        rows = await session.scalars(union_all(select(Document.file), select(Document.thumbnail)))
        assert sorted([await item.read() for item in rows]) == [b"f", b"t"]
