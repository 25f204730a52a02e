"""`doctor` reports beforehand for what reasons `gc` would be refused."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from datetime import timedelta
from pathlib import Path

import pytest

from granite_storage.locations import uuid7_hex
from tests.cli.conftest import Shop, shop_in

_OLD = time.time() - timedelta(days=2).total_seconds()


def execute(shop: Shop, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(shop.folder / "shop.db")) as connection:
        connection.execute(statement, values)
        connection.commit()


def refusals(shop: Shop, *arguments: str) -> tuple[int, list[tuple[str, str]]]:
    answer = shop.run("doctor", "--json", *arguments)
    found = [record for record in answer.records if record["what"] == "garbage collection"]
    return answer.code, [(record["result"], record["message"]) for record in found]


def test_nothing_would_be_refused(plain_shop: Shop) -> None:
    plain_shop.fill(1)
    assert refusals(plain_shop) == (0, [("ok", "a dry run with the defaults is not refused")])


@pytest.mark.parametrize(
    "value", ['{"a":1}', "[]", '"x"', '{"storage_key": "documents", "backend": "old", "location": "", "size": 1}']
)
def test_a_value_that_is_no_reference(plain_shop: Shop, value: str) -> None:
    plain_shop.fill(2)
    execute(plain_shop, "UPDATE shop_document SET file = ? WHERE id = 2", value)
    code, [(result, message)] = refusals(plain_shop)
    assert (code, result) == (1, "bad")
    assert "shop_document.file of the row 2 contains a value that is not a reference" in message
    assert "granite-storage verify finds all such values" in message
    answer = plain_shop.run("gc", "--yes")
    assert (answer.code, "contains a value that is not a reference" in answer.err) == (3, True)


def test_variants_that_cannot_be_read(plain_shop: Shop) -> None:
    plain_shop.fill(1)
    execute(plain_shop, "UPDATE shop_document SET file = json_set(file, '$.variants', 7)")
    code, [(result, message)] = refusals(plain_shop)
    assert (code, result) == (1, "bad")
    assert "contains a value that is not a reference" in message


def test_too_many_orphans(plain_shop: Shop) -> None:
    plain_shop.fill(2)
    first = plain_shop.files("old")[0]
    for path in [first.with_name(f"{uuid7_hex()}-lost.pdf") for _ in range(3)]:
        path.write_bytes(b"x")
        os.utime(path, (_OLD, _OLD))
    code, [(result, message)] = refusals(plain_shop)
    assert (code, result) == (0, "note")
    assert "would be refused: 3 of the 5 objects of 'documents' (60%) are orphans" in message
    assert "raise --max-share (of documents)" in message


def test_no_reference_to_anything(plain_shop: Shop) -> None:
    plain_shop.fill(1)
    [path] = plain_shop.files("old")
    os.utime(path, (_OLD, _OLD))
    execute(plain_shop, "DELETE FROM shop_document")
    code, [(result, message)] = refusals(plain_shop)
    assert (code, result) == (0, "note")
    assert "no reference leads to the only object of 'documents'" in message
    assert "--allow-no-references" in message


def test_a_database_without_workers_for_long(tmp_path: Path) -> None:
    shop = shop_in(tmp_path, "sqlite+aiosqlite:///shop.db", journaled=True)
    shop.fill(1)
    assert shop.run("recover", "--yes").code == 0
    execute(shop, "UPDATE granite_storage_meta SET changed = '2020-01-01 00:00:00.000000' WHERE name = 'heartbeat'")
    found = refusals(shop)[1]
    assert len(found) == 1, found
    assert found[0][0] == "note"
    assert "no worker of the journal was running for" in found[0][1]
    assert " days" in found[0][1]
    assert ":" not in found[0][1].partition("running for")[2].partition(":")[0]
    assert "pass --allow-restored-database" in found[0][1]


def test_a_folder_without_its_marker_gets_none_by_the_probe(plain_shop: Shop) -> None:
    """Without an identity in the rows only the marker tells that the disk is not mounted."""
    plain_shop.fill(1)
    execute(plain_shop, "UPDATE shop_document SET file = json_remove(file, '$.identity')")
    (plain_shop.folder / "old").rename(plain_shop.folder / "elsewhere")
    (plain_shop.folder / "old").mkdir()
    answer = plain_shop.run("doctor", "--json")
    found = {record["what"]: record for record in answer.records}
    assert (answer.code, found["backend old"]["result"]) == (1, "bad")
    assert "rows refer to it, and the folder of the backend 'old' has no marker file" in found["backend old"]["message"]
    assert "marker" in found["garbage collection"]["message"]
    assert list((plain_shop.folder / "old").iterdir()) == []
