"""What the commands say of files that have variants."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest

from granite_storage.locations import uuid7_hex
from tests.cli.conftest import Shop

SMALL = b"small"


@pytest.fixture
def small(plain_shop: Shop) -> Path:
    """The file of the variant that the first of two rows has; the second has had none."""
    plain_shop.fill(2)
    with closing(sqlite3.connect(plain_shop.folder / "shop.db")) as connection, connection:
        (raw,) = connection.execute("SELECT file FROM shop_document WHERE id = 1").fetchone()
        ref = json.loads(raw)
        location = f"{ref['location'].rpartition('/')[0]}/{uuid7_hex()}-small.txt"
        variant = {**ref, "location": location, "size": len(SMALL), "checksum": f"sha256:{sha256(SMALL).hexdigest()}"}
        whole = json.dumps({**ref, "variants": {"$.small": variant}})
        connection.execute("UPDATE shop_document SET file = ? WHERE id = 1", (whole,))
    path = plain_shop.folder / "old" / location
    path.write_bytes(SMALL)
    return path


def test_verify(plain_shop: Shop, small: Path) -> None:
    assert plain_shop.run("verify").code == 0
    small.unlink()
    answer = plain_shop.run("verify", "--json")
    assert answer.code == 1
    finding, report = answer.records
    assert (finding["finding"], finding["variant"], finding["primary_key"]) == ("missing", "$.small", [1])
    assert "made again" in finding["message"]
    assert (report["report"]["checked"], report["report"]["replaceable"]) == (3, 1)
    assert "of variants, which can be made again" in plain_shop.run("verify").out


def test_doctor(plain_shop: Shop, small: Path) -> None:
    answer = plain_shop.run("doctor", "--json", "--read-only")
    assert "3 references lead to the store that they were written to" in [record["message"] for record in answer.records]
    with closing(sqlite3.connect(plain_shop.folder / "shop.db")) as connection, connection:
        connection.execute("UPDATE shop_document SET file = json_set(file, '$.variants.\"$.small\"', 7) WHERE id = 1")
    said = [record["message"] for record in plain_shop.run("doctor", "--json", "--read-only").records]
    assert not [message for message in said if "all 3" in message]
    assert small.exists()


def test_migrate_and_gc(plain_shop: Shop, small: Path) -> None:
    answer = plain_shop.run("migrate", "--storage-key", "documents", "--to", "new", "--yes", "--json", WRITE_TO="new")
    assert (answer.code, answer.report["moved"], answer.report["failed"]) == (0, 3, 0)
    assert not small.exists()
    assert len(plain_shop.files("new")) == 3
    answer = plain_shop.run("gc", "--yes", "--json", "--grace", "0s", WRITE_TO="new")
    assert (answer.report["referenced"], answer.report["orphaned"]) == (3, 0)
    assert len(plain_shop.files("new")) == 3
