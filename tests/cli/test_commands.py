"""Each command on each database: what it answers, what it leaves, and its exit code.

Commands run in this process; those that a signal ends, and one whose reader goes away, in a process of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from granite_storage.locations import uuid7_hex
from tests.cli.conftest import Shop, interrupted

_REPEATED = pytest.mark.exhaustive("the same signal ends the same loop: one run for each signal, with a journal and without")
STOPPED = [
    pytest.param("sqlite", signal.SIGINT, id="sqlite-SIGINT"),
    pytest.param("sqlite", signal.SIGTERM, id="sqlite-SIGTERM", marks=_REPEATED),
    pytest.param("postgres", signal.SIGINT, id="postgres-SIGINT", marks=_REPEATED),
    pytest.param("postgres", signal.SIGTERM, id="postgres-SIGTERM", marks=_REPEATED),
    pytest.param("postgres-journal", signal.SIGINT, id="postgres-journal-SIGINT", marks=_REPEATED),
    pytest.param("postgres-journal", signal.SIGTERM, id="postgres-journal-SIGTERM"),
]


class TestVerify:
    def test_nothing_wrong(self, shop: Shop) -> None:
        shop.fill(3)
        answer = shop.run("verify")
        assert answer.code == 0, answer.err
        assert "references checked  3" in answer.out
        assert "an application may print" in answer.err

    def test_a_missing_object(self, shop: Shop) -> None:
        shop.fill(3)
        shop.files("old")[0].unlink()
        answer = shop.run("verify", "--json")
        assert answer.code == 1
        finding, report = answer.records
        assert (finding["finding"], finding["table"], finding["column"]) == ("missing", "shop_document", "file")
        assert report["report"]["counts"] == {"missing": 1}
        assert report["report"]["complete"] is True
        assert "missing: shop_document" in shop.run("verify").out

    def test_wrong_bytes(self, shop: Shop) -> None:
        shop.fill(2)
        shop.files("old")[0].write_bytes(b"y" * 1000)
        assert shop.run("verify").code == 0
        answer = shop.run("verify", "--deep", "--json", "--storage-key", "documents", "--rate", "10MB", "--concurrency", "2")
        assert answer.code == 1
        assert answer.report["counts"] == {"wrong checksum": 1}
        assert answer.report["bytes_read"] == 1000

    def test_an_unmounted_disk_is_an_error_and_not_missing(self, shop: Shop) -> None:
        shop.fill(2)
        (shop.folder / "old").rename(shop.folder / "elsewhere")
        (shop.folder / "old").mkdir()
        answer = shop.run("verify", "--json")
        assert answer.code == 3
        assert answer.report["counts"] == {}
        assert "marker" in answer.err
        assert "Traceback" not in answer.err

    @pytest.mark.parametrize(("shop_url", "number"), STOPPED, indirect=["shop_url"])
    def test_stopped_and_going_on(self, shop: Shop, number: signal.Signals) -> None:
        shop.fill(40)
        shop.files("old")[0].unlink()
        process = shop.start("verify", "--json", "--concurrency", "1", SLOW="0.05")
        answer = interrupted(process, number, after=1)
        assert answer.code == 128 + number
        assert 0 < answer.report["checked"] < 40
        assert "stopping" in answer.err
        rest = shop.run("verify", "--json", "--after", answer.report["key"])
        assert rest.report["checked"] == 40 - answer.report["checked"]


class TestMigrate:
    def test_nothing_happens_without_a_word(self, shop: Shop) -> None:
        shop.fill(3)
        for arguments, code in ((["--dry-run"], 0), ([], 2)):
            answer = shop.run("migrate", "--storage-key", "documents", "--to", "new", *arguments, WRITE_TO="new")
            assert answer.code == code
            assert "old" in answer.out
            assert len(shop.files("old")) == 3

    def test_there_and_back(self, shop: Shop) -> None:
        shop.fill(3)
        answer = shop.run("migrate", "--storage-key", "documents", "--to", "new", "--yes", "--json", WRITE_TO="new")
        assert answer.code == 0, answer.err
        assert (answer.report["moved"], answer.report["bytes_moved"], answer.report["complete"]) == (3, 3000, True)
        assert len(shop.files("new")) == 3
        if shop.journaled:
            assert shop.run("recover", "--yes").code == 0
        assert shop.files("old") == []
        answer = shop.run("migrate", "--storage-key", "documents", "--to", "old", "--yes")
        assert "moved   3 (3.0 kB)" in answer.out
        assert shop.run("verify", "--deep").code == 0
        assert "nothing is left to move" in shop.run("migrate", "--storage-key", "documents", "--to", "old", "--dry-run").out

    def test_a_policy_that_writes_elsewhere(self, shop: Shop) -> None:
        shop.fill(1)
        answer = shop.run("migrate", "--storage-key", "documents", "--to", "new", "--yes")
        assert (answer.code, answer.out) == (3, "")
        assert "writes to the backend 'old'" in answer.err

    def test_what_cannot_be_moved(self, shop: Shop) -> None:
        shop.fill(3)
        shop.files("old")[0].write_bytes(b"y" * 1000)
        answer = shop.run("migrate", "--storage-key", "documents", "--to", "new", "--yes", WRITE_TO="new")
        assert answer.code == 1
        assert "failed: shop_document" in answer.out
        assert len(shop.files("new")) == 2

    @pytest.mark.parametrize(("shop_url", "number"), STOPPED, indirect=["shop_url"])
    def test_stopped_and_going_on(self, shop: Shop, number: signal.Signals) -> None:
        shop.fill(40)
        arguments = ["migrate", "--storage-key", "documents", "--to", "new", "--yes", "--json"]
        process = shop.start(*arguments, "--concurrency", "1", SLOW="0.05", WRITE_TO="new")
        answer = interrupted(process, number, after=5)
        assert answer.code == 128 + number
        assert 0 < answer.report["moved"] < 40
        assert "not complete" in answer.err
        assert shop.run("verify", "--deep", WRITE_TO="new").code == 0
        rest = shop.run(*arguments, "--after", answer.report["key"], WRITE_TO="new")
        assert rest.report["moved"] == 40 - answer.report["moved"]
        if shop.journaled:
            shop.run("recover", "--yes")
        assert (len(shop.files("old")), len(shop.files("new"))) == (0, 40)

    @pytest.mark.parametrize("shop_url", ["sqlite", pytest.param("postgres", marks=_REPEATED), "postgres-journal"], indirect=True)
    def test_killed_and_run_again(self, shop: Shop) -> None:
        shop.fill(60)
        arguments = ["migrate", "--storage-key", "documents", "--to", "new", "--yes", "--json"]
        process = shop.start(*arguments, "--concurrency", "2", SLOW="0.05", WRITE_TO="new")
        answer = interrupted(process, signal.SIGKILL, after=5)
        assert answer.code == -signal.SIGKILL
        assert shop.run("verify", "--deep", WRITE_TO="new").code == 0
        assert shop.run(*arguments, WRITE_TO="new").report["complete"] is True
        assert shop.run("verify", "--deep", WRITE_TO="new").code == 0


class TestRecover:
    def test_without_a_journal(self, plain_shop: Shop) -> None:
        plain_shop.fill(1)
        answer = plain_shop.run("recover")
        assert answer.code == 3
        assert "no journal" in answer.err

    @pytest.mark.parametrize("shop_url", ["postgres-journal"], indirect=True)
    def test_it_shows_and_asks_and_deletes(self, shop: Shop) -> None:
        shop.fill(2)
        shop.run("migrate", "--storage-key", "documents", "--to", "new", "--yes", WRITE_TO="new")
        answer = shop.run("recover", "--dry-run", "--json", WRITE_TO="new")
        assert answer.code == 0
        assert answer.records == [{"waiting": [{"backend": "old", "work": "delete", "due": 2, "later": 0, "dead": 0}]}]
        assert shop.run("recover", WRITE_TO="new").code == 2
        assert len(shop.files("old")) == 2
        answer = shop.run("recover", "--yes", "--json", WRITE_TO="new")
        assert (answer.code, answer.report["deleted"], answer.report["failed"]) == (0, 2, [])
        assert shop.files("old") == []
        assert "nothing is waiting" in shop.run("recover", "--dry-run").out
        assert "will be retried" in shop.run("recover", "--yes", "--retry-dead-letters").err


class TestGc:
    def orphans(self, shop: Shop, count: int) -> list[Path]:
        """Leave some orphans, two days old like everything else."""
        then = time.time() - 2 * 24 * 3600
        first = shop.files("old")[0]
        made = [first.with_name(f"{uuid7_hex()}-lost.pdf") for _ in range(count)]
        for path in made:
            path.write_bytes(b"x" * 1000)
        for path in shop.files("old"):
            os.utime(path, (then, then))
        return made

    def test_it_shows_and_asks_and_deletes(self, shop: Shop) -> None:
        shop.fill(3)
        [orphan] = self.orphans(shop, 1)
        for arguments, code in ((["--dry-run"], 0), ([], 2)):
            answer = shop.run("gc", *arguments)
            assert answer.code == code, answer.err
            assert f"{orphan.name} (1.0 kB)" in answer.out
            assert "orphaned    1 (1.0 kB)" in answer.out
            assert len(shop.files("old")) == 4
        answer = shop.run("gc", "--yes", "--json", "--storage-key", "documents", "--grace", "1d")
        assert answer.code == 0, answer.err
        assert answer.records[0]["object"] == "deleted"
        assert (answer.report["deleted"], answer.report["deleted_bytes"], answer.report["complete"]) == (1, 1000, True)
        assert len(shop.files("old")) == 3
        assert shop.run("verify").code == 0
        assert shop.run("gc", "--yes").code == 0

    def test_what_is_only_mentioned(self, plain_shop: Shop) -> None:
        plain_shop.fill(3)
        with contextlib.closing(sqlite3.connect(plain_shop.folder / "shop.db")) as connection:
            connection.execute("CREATE TABLE note AS SELECT file AS text FROM shop_document WHERE id = 1")
            connection.execute("DELETE FROM shop_document WHERE id = 1")
            connection.commit()
        answer = plain_shop.run("gc", "--yes", "--grace", "0s", "--max-share", "1")
        assert answer.code == 0, answer.err
        assert "mentioned   1" in answer.out
        assert "kept: main.note.text mentions 1 of them" in answer.out
        assert len(plain_shop.files("old")) == 3

    def test_objects_within_the_grace_period_stay(self, plain_shop: Shop) -> None:
        plain_shop.fill(3)
        self.orphans(plain_shop, 1)
        answer = plain_shop.run("gc", "--yes", "--json", "--grace", "3d")
        assert (answer.code, answer.report["within_grace_period"], answer.report["deleted"]) == (0, 1, 0)

    def test_the_fuse(self, plain_shop: Shop) -> None:
        plain_shop.fill(1)
        self.orphans(plain_shop, 3)
        answer = plain_shop.run("gc", "--dry-run")
        assert answer.code == 1
        assert "nothing would be deleted: 3 of the 4 objects" in answer.out
        answer = plain_shop.run("gc", "--yes")
        assert answer.code == 3
        assert "raise --max-share" in answer.err
        assert "To continue" not in answer.err
        assert len(plain_shop.files("old")) == 4
        assert plain_shop.run("gc", "--yes", "--max-share", "0.8").code == 0
        assert len(plain_shop.files("old")) == 1

    def test_dangling_references(self, plain_shop: Shop) -> None:
        plain_shop.fill(3)
        plain_shop.files("old")[0].unlink()
        answer = plain_shop.run("gc", "--yes")
        assert answer.code == 1
        assert "dangling: old:shop_document" in answer.out

    def test_an_unmounted_disk(self, plain_shop: Shop) -> None:
        plain_shop.fill(2)
        (plain_shop.folder / "old").rename(plain_shop.folder / "elsewhere")
        (plain_shop.folder / "old").mkdir()
        answer = plain_shop.run("gc", "--yes")
        assert answer.code == 3
        assert "marker" in answer.err

    @pytest.mark.parametrize("arguments", [["--grace", "soon"], ["--max-share", "2"]])
    def test_what_is_not_understood(self, plain_shop: Shop, arguments: list[str]) -> None:
        assert plain_shop.run("gc", *arguments).code == 2

    def test_an_unknown_policy(self, plain_shop: Shop) -> None:
        assert plain_shop.run("gc", "--storage-key", "nothing").code == 2

    @pytest.mark.case("GCX-09")
    @pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=_REPEATED), signal.SIGTERM, signal.SIGKILL])
    def test_stopped_and_run_again(self, plain_shop: Shop, number: signal.Signals) -> None:
        plain_shop.fill(3)
        self.orphans(plain_shop, 2500)
        arguments = ["gc", "--yes", "--json", "--max-share", "1"]
        answer = interrupted(plain_shop.start(*arguments), number, after=1)
        assert answer.code == (-number if number is signal.SIGKILL else 128 + number)
        left = len(plain_shop.files("old")) - 3
        assert 0 < left < 2500
        if number is not signal.SIGKILL:
            assert answer.report["deleted"] == 2500 - left
            assert "not complete" in answer.err
        assert plain_shop.run("verify").code == 0
        assert plain_shop.run(*arguments).report["deleted"] == left
        assert plain_shop.run("verify").code == 0


class TestObjects:
    def test_ls(self, shop: Shop) -> None:
        shop.fill(3)
        assert shop.run("ls").out.split() == ["policy", "backend", "prefix", "documents", "old", "-", "new"]
        lines = shop.run("ls", "old:").out.splitlines()
        assert len(lines) == 3
        assert all(line.split()[0:2] == ["1.0", "kB"] for line in lines)
        assert len(shop.run("ls", "old:", "--limit", "2", "--json").records) == 2
        assert shop.run("ls", "old:no").out == ""
        assert [record["backend"] for record in shop.run("ls", "--json").records] == ["old", "new"]

    def test_ls_of_nothing(self, plain_shop: Shop) -> None:
        assert plain_shop.run("ls", "older:").code == 2

    def test_stat(self, shop: Shop) -> None:
        shop.fill(1)
        answer = shop.run("stat", f"old:{shop.location()}", "--json")
        assert answer.code == 0
        assert (answer.records[0]["size"], answer.records[0]["location"]) == (1000, shop.location())
        assert "1,000 bytes" in shop.run("stat", f"old:{shop.location()}").out

    @pytest.mark.parametrize(("address", "code"), [("old:nothing/here", 1), ("old:../shop.py", 2), ("old:", 2), ("gone:x", 2)])
    def test_stat_of_nothing(self, plain_shop: Shop, address: str, code: int) -> None:
        plain_shop.fill(1)
        answer = plain_shop.run("stat", address)
        assert (answer.code, answer.out) == (code, "")
        assert answer.err

    def test_cp_out(self, plain_shop: Shop) -> None:
        plain_shop.fill(1)
        source = f"old:{plain_shop.location()}"
        target = plain_shop.folder / "out.pdf"
        assert plain_shop.run("cp", source, "out.pdf").code == 0
        assert target.read_bytes() == b"x" * 1000
        target.write_bytes(b"precious")
        assert plain_shop.run("cp", source, "out.pdf").code == 1
        assert target.read_bytes() == b"precious"
        assert plain_shop.run("cp", source, "out.pdf", "--force").code == 0
        assert target.read_bytes() == b"x" * 1000
        (plain_shop.folder / "folder").mkdir()
        assert plain_shop.run("cp", source, "folder").code == 0
        assert [path.name for path in (plain_shop.folder / "folder").iterdir()] == [source.rpartition("/")[2]]
        assert plain_shop.run("cp", source, "-").out == "x" * 1000

    def test_cp_out_of_what_is_not_there_leaves_nothing(self, plain_shop: Shop) -> None:
        plain_shop.fill(1)
        before = set(plain_shop.folder.iterdir())
        answer = plain_shop.run("cp", "old:no/such/object", "out.pdf")
        assert (answer.code, "no object exists at old:no/such/object" in answer.err) == (1, True)
        answer = plain_shop.run("cp", f"old:{plain_shop.location()}", "no/such/folder/out.pdf")
        assert (answer.code, "there is no folder no/such/folder: create it" in answer.err) == (2, True)
        assert set(plain_shop.folder.iterdir()) - before <= {plain_shop.folder / "__pycache__"}

    def test_cp_in(self, shop: Shop) -> None:
        shop.fill(1)
        (shop.folder / "in.pdf").write_bytes(b"new")
        answer = shop.run("cp", "in.pdf", "documents:", "--model", "m", "--entity", "7", "--field", "f")
        assert answer.code == 0, answer.err
        ref = json.loads(answer.out)
        assert (ref["storage_key"], ref["backend"], ref["size"], ref["content_type"]) == (
            "documents",
            "old",
            3,
            "application/pdf",
        )
        assert ref["location"].startswith("m/7/f/")
        assert "no row refers to it" in answer.err
        assert shop.run("cp", f"old:{ref['location']}", "-").out == "new"

    def test_cp_of_neither(self, plain_shop: Shop) -> None:
        answer = plain_shop.run("cp", "a", "b")
        assert answer.code == 2
        assert "must be an object" in answer.err


class TestDoctor:
    def test_all_is_well(self, shop: Shop) -> None:
        shop.fill(1)
        answer = shop.run("doctor", "--json", FOREIGN_KEYS="1" if "sqlite" in shop.url else "")
        assert answer.code == 0, answer.out
        verdicts = {record["what"]: record["result"] for record in answer.records}
        assert verdicts["backend old"] == verdicts["tables"] == verdicts["database"] == verdicts["models"] == "ok"
        assert verdicts["journal"] == ("ok" if shop.journaled else "note")
        assert len(shop.files("old")) == 1
        if "sqlite" in shop.url:
            assert verdicts["SQLite transactions"] == "note"
        else:
            assert verdicts["the database's clock"] == "ok"

    def test_read_only_writes_nothing(self, plain_shop: Shop) -> None:
        plain_shop.fill(1)
        (plain_shop.folder / "new").mkdir(exist_ok=True)
        answer = plain_shop.run("doctor", "--read-only", WRITE_TO="new")
        assert answer.code == 0
        assert list((plain_shop.folder / "new").iterdir()) == []

    def test_missing_tables(self, shop: Shop) -> None:
        shop.fill(1)
        shop.drop()
        answer = shop.run("doctor")
        assert answer.code == 1
        assert "shop_document" in answer.out

    def test_a_database_out_of_reach(self, plain_shop: Shop) -> None:
        answer = plain_shop.run("doctor", "--json", DATABASE_URL="postgresql+asyncpg://nobody@127.0.0.1:1/none")
        assert answer.code == 1
        assert next(record["result"] for record in answer.records if record["what"] == "database") == "bad"

    def test_a_backend_that_cannot_be_written_to(self, plain_shop: Shop) -> None:
        plain_shop.fill(1)
        (plain_shop.folder / "new").write_text("a file in the place of a folder")
        answer = plain_shop.run("doctor", WRITE_TO="new")
        assert answer.code == 1
        assert "bad" in answer.out


def test_a_reader_that_has_seen_enough(plain_shop: Shop, tmp_path: Path) -> None:
    plain_shop.fill(300)
    process = plain_shop.start("ls", "old:")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    process.wait(30)
    assert "Traceback" not in err
    assert "rror" not in err
