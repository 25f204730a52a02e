"""What `recover` shows of the work of the journal, and how it reports files of which no variant can be made."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from uuid import uuid4

import pytest

from tests.cli.conftest import Shop, shop_in

LATER = {"VARIANTS": "loud quiet", "RECIPE": "1", "WHEN": "later", "EFFECTS": "search"}

# On SQLite the uploads of committed transactions are checked as well.
CHECKED = {"upload to check": (0, 3, 0)}


@pytest.fixture
def journaled_shop(tmp_path: Path) -> Shop:
    return shop_in(tmp_path, "sqlite+aiosqlite:///shop.db", journaled=True)


def execute(shop: Shop, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(shop.folder / "shop.db")) as connection:
        connection.execute(statement, values)
        connection.commit()


class TestPlans:
    def test_all_kinds_of_work(self, journaled_shop: Shop) -> None:
        shop = journaled_shop
        shop.fill(3, **LATER)
        execute(
            shop,
            "INSERT INTO granite_storage_job SELECT ?, table_name, column_name, backend, location, 'scan', '', '9999-01-01', 0,"
            " 0, NULL, 0 FROM granite_storage_job LIMIT 1",
            uuid4().hex,
        )
        execute(shop, "UPDATE granite_storage_job SET due = '9999-01-01' WHERE key = 'variant:quiet'")
        answer = shop.run("recover", "--dry-run", "--json", **LATER)
        assert answer.code == 0, answer.err
        [record] = answer.records
        plan = {item["work"]: (item["due"], item["later"], item["dead"]) for item in record["waiting"]}
        assert (
            plan
            == {"variant loud": (3, 0, 0), "variant quiet": (0, 3, 0), "effect search": (3, 0, 0), "scan": (0, 1, 0)} | CHECKED
        )
        answer = shop.run("recover", **LATER)
        assert (answer.code, "there is no terminal" in answer.err) == (2, True)
        assert answer.out.split("\n")[0].split() == ["backend", "work", "due", "now", "later", "dead", "letters"]
        assert shop.run("recover", "--yes", "--json", **LATER).report["derived"] == 3

    def test_nothing_is_waiting(self, journaled_shop: Shop) -> None:
        journaled_shop.fill(0)
        answer = journaled_shop.run("recover")
        assert (answer.code, answer.out) == (0, "nothing is waiting\n"), answer.err

    def test_nothing_is_due(self, journaled_shop: Shop) -> None:
        journaled_shop.fill(1, **LATER)
        execute(journaled_shop, "UPDATE granite_storage_job SET due = '9999-01-01', dead = (key = 'effect:search')")
        answer = journaled_shop.run("recover", **LATER)
        assert (answer.code, "nothing is due now" in answer.err) == (0, True)
        assert journaled_shop.run("recover", "--retry-dead-letters", **LATER).code == 2


class TestRefusals:
    def test_they_are_no_failures(self, journaled_shop: Shop) -> None:
        environment = {"VARIANTS": "loud", "RECIPE": "1", "WHEN": "later", "REFUSE": "1"}
        journaled_shop.fill(1, **environment)
        answer = journaled_shop.run("recover", "--yes", **environment)
        assert answer.code == 0, answer.out
        assert "refused: old:shop_document/1/" in answer.out
        assert "it is no text (no failure)" in answer.out
        later = journaled_shop.run("recover", "--yes", "--json", **environment)
        assert (later.code, later.report["underivable"], later.report["refused"], later.report["failed"]) == (0, 1, [], [])
        again = journaled_shop.run("recover", "--yes", "--json", "--retry-dead-letters", **environment)
        assert (again.code, len(again.report["refused"])) == (0, 1)
        checks = journaled_shop.run("doctor", "--json", **environment)
        [jobs] = [record for record in checks.records if record["what"] == "jobs"]
        assert (checks.code, jobs["result"]) == (0, "note")
        assert jobs["message"] == "1 variant cannot be made: the recipes refuse the originals"

    def test_derive(self, journaled_shop: Shop) -> None:
        journaled_shop.fill(1)
        answer = journaled_shop.run("derive", VARIANTS="loud", RECIPE="1", REFUSE="1")
        assert answer.code == 0, answer.err
        assert "refused: shop_document 1 file loud: it is no text" in answer.out


class TestMissingTables:
    @pytest.mark.parametrize("arguments", [["--dry-run"], ["--yes"], ["--yes", "--retry-dead-letters"]], ids="".join)
    @pytest.mark.parametrize("table", ["intent", "reclaim", "job", "meta"])
    def test_recover(self, journaled_shop: Shop, table: str, arguments: list[str]) -> None:
        """It names the one that was renamed after the journal was first used."""
        journaled_shop.fill(1)
        execute(journaled_shop, f"ALTER TABLE granite_storage_{table} RENAME TO moved_away")
        answer = journaled_shop.run("recover", *arguments)
        assert answer.code == 3
        assert f"the journal's table granite_storage_{table} is missing" in answer.err
        assert "Traceback" not in answer.err
