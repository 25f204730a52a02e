"""The commands over rows, with a schema for each tenant: they look at all of them, and at one where it is named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.conftest import Shop

TENANTS = {"TENANTS": "tenant_anna tenant_ben"}
MOVE = ("migrate", "--storage-key", "documents", "--to", "new")


@pytest.fixture
def filled(shop: Shop) -> Iterator[Shop]:
    """One file in the default schema, and one of each tenant."""
    shop.fill(1, **TENANTS)
    yield shop
    shop.drop(**TENANTS)


def test_verify(filled: Shop) -> None:
    sound = filled.run("verify", "--json", **TENANTS)
    assert (sound.code, sound.report["checked"], sound.report["unseen"]) == (0, 3, [])
    one = filled.run("verify", "--json", "--schema", "tenant_ben", **TENANTS)
    assert (one.code, one.report["checked"]) == (0, 1)
    for path in filled.files("old"):
        path.unlink()
    lost = filled.run("verify", "--json", **TENANTS)
    assert (lost.code, lost.report["counts"]) == (1, {"missing": 3})
    tables = [record["table"] for record in lost.records[:-1]]
    assert tables == ["shop_document", "tenant_anna.shop_document", "tenant_ben.shop_document"]


def test_migrate(filled: Shop) -> None:
    dry = filled.run(*MOVE, "--dry-run", "--json", WRITE_TO="new", **TENANTS)
    assert dry.records == [{"waiting": [{"backend": "old", "objects": 3, "bytes": 3000}]}]
    one = filled.run(*MOVE, "--yes", "--json", "--schema", "tenant_ben", WRITE_TO="new", **TENANTS)
    assert (one.code, one.report["moved"], one.report["complete"]) == (0, 1, True)
    rest = filled.run(*MOVE, "--yes", "--json", WRITE_TO="new", **TENANTS)
    assert (rest.code, rest.report["moved"], rest.report["complete"]) == (0, 2, True)
    if filled.journaled:
        assert filled.run("recover", "--yes", WRITE_TO="new", **TENANTS).code == 0
    assert filled.files("old") == []
    assert filled.run("verify", "--deep", WRITE_TO="new", **TENANTS).code == 0


def test_derive(filled: Shop) -> None:
    variants = {"VARIANTS": "loud", "RECIPE": "1", **TENANTS}
    one = filled.run("derive", "--json", "--schema", "tenant_ben", **variants)
    assert (one.code, one.report["counts"]) == (0, {"made": 1})
    rest = filled.run("derive", "--json", **variants)
    assert (rest.code, rest.report["counts"]) == (0, {"made": 2})


def test_a_schema_without_the_tables(filled: Shop) -> None:
    for command in (("verify",), (*MOVE, "--yes"), ("derive",)):
        refused = filled.run(*command, "--schema", "nowhere", WRITE_TO="new", **TENANTS)
        assert refused.code == 2
        assert "--schema: the schema 'nowhere' has none of the tables" in refused.err


def test_what_could_not_be_seen(filled: Shop) -> None:
    """The references of tenants are to another store than the backend leads to now: no command says that all is well."""
    (filled.folder / "old" / ".granite-storage").write_text("01a2281327a37ccd97661f33e72f1b33\n")
    answer = filled.run("verify", **TENANTS)
    assert answer.code == 1
    assert "not seen: every reference in tenant_anna.shop_document" in " ".join(answer.out.split())
    assert "--schema" in answer.out
    dry = filled.run(*MOVE, "--dry-run", WRITE_TO="new", **TENANTS)
    assert dry.code == 1
    assert "not seen" in dry.out
    moved = filled.run(*MOVE, "--yes", "--json", WRITE_TO="new", **TENANTS)
    assert (moved.code, moved.report["complete"], len(moved.report["unseen"])) == (1, False, 2)
    derived = filled.run("derive", "--json", "--dry-run", VARIANTS="loud", RECIPE="1", **TENANTS)
    assert derived.code == 1
