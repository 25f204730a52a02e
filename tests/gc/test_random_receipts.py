"""Random receipts: Python, SQL and the collector see the same objects in them, on every database."""

from __future__ import annotations

import json
import random
from typing import Any

from sqlalchemy import select
from sqlalchemy import text as sql

from granite_storage import StoredObjectRef
from granite_storage.gc.database import DatabaseReferences
from granite_storage.locations import make_location
from granite_storage.orm.columns import join_variants, location_of, value_in, variant_locations, variants_in
from granite_storage.orm.references import iter_model_storage_refs
from granite_storage.refs import iter_refs
from tests.gc.environment import Base, Crate, GcEnvironment
from tests.tiers import repetitions, seed

ROWS = repetitions("RECEIPTS", default=120, exhaustive=1500)
ODD = [
    *(
        "'",
        '"',
        "\\",
        "\\\\",
        "\\u0041",
        '\\"',
        "`",
        "%",
        "_",
        ";",
        "--",
        "$",
        "$.x",
        "$.*",
        "*",
        "[0]",
        "?",
        ":x",
        "{}",
        "}",
        "->>",
    ),
    *(
        "é",
        "ß",
        "\u0130",
        "e\u0301",
        "漢",
        "\U0001f600",
        "\U0010fffd",
        "\u202e",
        "\uffff",
        " ",
        "\t",
        "\n",
        "\x7f",
        "\u2028",
        "null",
    ),
    *("a", "A", "b", "0", "true", "~", "location", "variants", "key", "value", "."),
]
"""What a database, a driver, or a path of JSON may take for something of its own."""


def text(choose: random.Random) -> str:
    pieces = choose.choices(ODD, k=choose.randint(1, 4))
    return "".join(pieces) * (choose.randint(20, 120) if choose.random() < 0.03 else 1)


def location(choose: random.Random) -> str:
    if choose.random() < 0.3:
        return make_location(key_prefix="docs", model_name="m", entity_id="1", field_name="f", original_filename="a.txt")
    return f"{text(choose)}/{choose.getrandbits(64):x}{text(choose)}"


def plain(choose: random.Random) -> dict[str, Any]:
    """Return a ref without variants as JSON."""
    return {
        "storage_key": choose.choice(["docs", text(choose)]),
        "backend": "store",
        "location": location(choose),
        "size": choose.choice([0, 1, 1 << 62]),
        **choose.choice([{}, {"checksum": None}, {"content_type": "text/plain", "original_filename": text(choose)}]),
        **choose.choice([{}, {"extra": {text(choose): [text(choose), {"location": location(choose)}]}}]),
        **choose.choice([{}, {"recipe": text(choose)}, {text(choose) + "!": {"variants": {"a": {"location": text(choose)}}}}]),
    }


def receipt(choose: random.Random) -> dict[str, Any]:
    """Return a ref as JSON, with or without variants."""
    ref = plain(choose)
    names = ["$.x", "a b", "", "thumb", "thumb.webp", "variants", "location", *(text(choose) for _ in range(3))]
    match choose.randrange(6):
        case 0:
            return ref
        case 1:
            return {**ref, "variants": None}
        case 2:
            return {**ref, "variants": {}}
        case _:
            chosen = choose.sample([name for name in names if name], choose.randint(1, 5))
            variants = {name: {**plain(choose), **choose.choice([{}, {"variants": None}])} for name in chosen}
            return dict(choose.sample(list({**ref, "variants": variants}.items()), len(ref) + 1))


async def test_the_same_objects_in_python_in_sql_and_for_the_collector(env: GcEnvironment) -> None:
    choose = random.Random(seed())
    file, scan = (Base.metadata.tables["gc_crate"].c[name] for name in ("file", "scan"))
    receipts = [(receipt(choose), receipt(choose)) for _ in range(ROWS)]
    expected: dict[str, set[str]] = {"file": set(), "scan": set()}
    for pair in receipts:
        for name, one in zip(expected, pair, strict=True):
            expected[name] |= {ref.location for ref in iter_refs(StoredObjectRef.from_dict(one))}
    await insert_all(env, receipts)
    everything = expected["file"] | expected["scan"]
    assert len(everything) > 2 * ROWS

    async with env.engine.connect() as connection:
        dialect = connection.dialect.name
        for column in (file, scan):
            own, nested = location_of(column, dialect)[1], variants_in(column, dialect)
            found = (await connection.execute(select(own, nested).where(column.is_not(None)))).all()
            in_sql = {ref for ref, _ in found}.union(*(variant_locations(variants) for _, variants in found))
            assert in_sql == expected[column.name]
            unnested, variant = join_variants(column, dialect)
            each = select(value_in(variant, "location", dialect)).select_from(unnested)
            assert {ref for ref, _ in found} | set((await connection.execute(each)).scalars()) == expected[column.name]
    async with env.sessions() as session:
        for name, locations in expected.items():
            assert {ref.location async for ref in iter_model_storage_refs(session, Crate, name)} == locations

    source = DatabaseReferences(env.binding, env.sessions, "store")
    await source.require_fit(allow_restored_database=False)
    nominated: set[str] = set()
    async with source.in_order() as pages:
        async for page in pages:
            nominated |= {found for found, is_here in page if is_here}
    named = nominated - everything  # what an `extra` names
    assert everything <= nominated
    assert all("docs/m/1/f/" in found for found in named)
    asked = sorted({*everything, *(f"{found}x" for found in sorted(everything) if "docs/m/1/f/" not in found)})
    protected: set[str] = set()
    for start in range(0, len(asked), source.batch_size):
        protected |= await source.find_references(asked[start : start + source.batch_size])
    assert protected == everything
    counted = await source.count_by_store()
    assert sum(counted.values()) == sum(len(list(iter_refs(StoredObjectRef.from_dict(one)))) for pair in receipts for one in pair)


async def insert_all(env: GcEnvironment, receipts: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Write them as they are: the types of the columns would leave out what is null."""
    values = ("CAST(:file AS JSONB), CAST(:scan AS JSONB)", ":file, :scan")[not env.database.is_postgres]
    statement = f"INSERT INTO gc_crate (id, kind, deleted, file, scan) VALUES (:id, 'crate', :deleted, {values})"  # noqa: S608
    rows = [
        {"id": number, "deleted": False, "file": dump(number, pair[0]), "scan": dump(number, pair[1])}
        for number, pair in enumerate(receipts, 1)
    ]
    async with env.engine.begin() as connection:
        await connection.execute(sql(statement), rows)


def dump(number: int, one: dict[str, Any]) -> str:
    """Write JSON with other characters as they are, and escaped."""
    return json.dumps(one, ensure_ascii=bool(number % 2))
