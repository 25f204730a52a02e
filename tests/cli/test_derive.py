"""The command `derive`: which variants it makes, what it asks before it replaces any, and how it goes on after it was stopped."""

from __future__ import annotations

import contextlib
import signal
import sqlite3

import pytest

from tests.cli.conftest import Shop, interrupted

LOUD = {"VARIANTS": "loud", "RECIPE": "1"}


def variants(shop: Shop) -> list[bytes]:
    """Return the contents of all variants."""
    return sorted(path.read_bytes()[-1:] for path in shop.files("old") if path.stat().st_size != 1000)


def test_missing(shop: Shop) -> None:
    shop.fill()
    dry = shop.run("derive", "--dry-run", "--json", **LOUD)
    assert (dry.code, dry.records) == (
        0,
        [{"waiting": [{"column": "shop_document.file", "variant": "loud", "because": "missing", "files": 3}]}],
    )
    assert variants(shop) == []
    answer = shop.run("derive", "--json", **LOUD)
    assert answer.code == 0, answer.err
    assert [record["object"] for record in answer.records[:-1]] == ["made"] * 3
    report = answer.report
    assert (report["rows"], report["counts"], report["complete"], report["failed"]) == (3, {"made": 3}, True, 0)
    assert variants(shop) == [b"1"] * 3
    again = shop.run("derive", **LOUD)
    assert again.code == 0
    assert "made" not in again.out


def test_stale_is_asked_for(shop: Shop) -> None:
    shop.fill()
    shop.run("derive", **LOUD)
    changed = {**LOUD, "RECIPE": "2"}
    refused = shop.run("derive", "--stale", **changed)
    assert refused.code == 2
    assert "pass --yes" in refused.err
    assert "other recipe" in refused.out
    assert variants(shop) == [b"1"] * 3
    answer = shop.run("derive", "--stale", "--yes", "--json", **changed)
    assert (answer.code, answer.report["counts"]) == (0, {"made": 3})
    assert shop.run("recover", "--yes", **changed).code == 0 if shop.journaled else True
    assert variants(shop) == [b"2"] * 3


def test_a_value_that_is_no_ref(plain_shop: Shop) -> None:
    """It is named as what it is, and not as a variant without a name."""
    plain_shop.fill(2)
    with contextlib.closing(sqlite3.connect(plain_shop.folder / "shop.db")) as connection, connection:
        connection.execute("""UPDATE shop_document SET file = '{"broken": true}' WHERE id = 1""")
    dry = plain_shop.run("derive", "--dry-run", **LOUD)
    assert ["shop_document.file", "(all)", "unreadable", "value", "1"] in [line.split() for line in dry.out.splitlines()]
    answer = plain_shop.run("derive", **LOUD)
    assert answer.code == 1
    assert "failed: shop_document 1 file: " in answer.out + answer.err


def test_all_and_undeclared(plain_shop: Shop) -> None:
    plain_shop.fill(2)
    two = {"VARIANTS": "loud quiet", "RECIPE": "1"}
    assert plain_shop.run("derive", "--variant", "quiet", "--json", **two).report["counts"] == {"made": 2}
    assert plain_shop.run("derive", "--column", "shop_document.file", "--json", **two).report["counts"] == {"made": 2}
    answer = plain_shop.run("derive", "--all", "--yes", "--json", **two)
    assert answer.report["counts"] == {"made": 4}
    dropped = plain_shop.run("derive", "--drop-undeclared", "--yes", "--json", **LOUD)
    assert dropped.report["counts"] == {"dropped": 2}
    assert len(variants(plain_shop)) == 2


def test_refused(plain_shop: Shop) -> None:
    plain_shop.fill(1)
    answer = plain_shop.run("derive", "--variant", "laud", **LOUD)
    assert (answer.code, "no column declares a variant or an effect 'laud'" in answer.err) == (2, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped(plain_shop: Shop, number: signal.Signals) -> None:
    plain_shop.fill(8)
    slow = {**LOUD, "DERIVING": "0.1"}
    process = plain_shop.start("derive", "--concurrency", "1", "--rate", "100kB", "--json", **slow)
    answer = interrupted(process, number, after=2)
    made = len(variants(plain_shop))
    assert 2 <= made < 8
    if number is signal.SIGINT:
        assert answer.code == 128 + number
        rest = plain_shop.run("derive", "--after", answer.report["key"], "--json", **LOUD)
    else:
        rest = plain_shop.run("derive", "--json", **LOUD)
    assert (rest.code, rest.report["complete"]) == (0, True)
    assert plain_shop.run("verify", **LOUD).code == 0
    assert plain_shop.run("derive", "--dry-run", "--json", **LOUD).records == [{"waiting": []}]
