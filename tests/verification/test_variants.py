"""Variants are verified as the objects that they are; a finding says which one it is about, and that it can be made again."""

from __future__ import annotations

import json

import pytest

from granite_storage import StoredObjectRef
from granite_storage.verification import Problem, Verification, verify
from tests.migration.environment import MigrationEnvironment, Shelf, file, give_variants


@pytest.fixture
async def ref(env: MigrationEnvironment) -> StoredObjectRef:
    """The ref of a row with two variants."""
    await env.add(Shelf(id=1, file=file("abc")))
    return await give_variants(env, 1, thumb=b"small", card=b"larger")


def variant(ref: StoredObjectRef, name: str) -> StoredObjectRef:
    assert ref.variants is not None
    return ref.variants[name]


async def test_nothing_wrong(env: MigrationEnvironment, ref: StoredObjectRef) -> None:
    report = await verify(env.binding, deep=True)
    assert (report.rows, report.checked, report.problems, report.replaceable) == (1, 3, 0, 0)
    assert report.bytes_read == len("abcsmalllarger")


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, Problem.MISSING), (b"smaller", Problem.WRONG_SIZE), (b"smell", Problem.WRONG_CHECKSUM)],
    ids=["missing", "size", "checksum"],
)
async def test_damaged(
    env: MigrationEnvironment, ref: StoredObjectRef, content: bytes | None, problem: Problem, deep: bool
) -> None:
    location = variant(ref, "thumb").location
    await env.old.delete(location)
    if content is not None:
        await env.old.put_bytes(location, content)
    verification = verify(env.binding, deep=deep)
    findings = [finding async for finding in verification]
    if problem is Problem.WRONG_CHECKSUM and not deep:
        assert findings == []
        return
    assert [(f.problem, f.table, f.primary_key, f.column, f.variant, f.ref) for f in findings] == [
        (problem, "migration_shelf", (1,), "file", "thumb", variant(ref, "thumb"))
    ]
    assert findings[0].is_replaceable
    assert not findings[0].is_harmless
    assert findings[0].message.startswith("the variant 'thumb': ")
    assert findings[0].message.endswith("nothing is lost, as it can be made again from its original")
    report = verification.report
    assert (report.problems, report.replaceable, report.counts[problem]) == (1, 1, 1)


async def test_the_original_is_a_loss(env: MigrationEnvironment, ref: StoredObjectRef) -> None:
    for one in (ref, variant(ref, "card")):
        await env.old.delete(one.location)
    report = await verify(env.binding)
    assert [(f.variant, f.is_replaceable) for f in report.findings] == [(None, False), ("card", True)]
    assert "made again" not in report.findings[0].message
    assert (report.problems, report.replaceable) == (2, 1)


async def test_an_unknown_checksum_is_harmless(env: MigrationEnvironment, ref: StoredObjectRef) -> None:
    whole = ref.to_dict()
    whole["variants"]["thumb"]["checksum"] = ""
    await env.set_raw(1, json.dumps(whole))
    report = await verify(env.binding, deep=True)
    assert [(f.problem, f.variant) for f in report.findings] == [(Problem.UNKNOWN_CHECKSUM, "thumb")]
    assert (report.problems, report.replaceable) == (0, 0)


@pytest.mark.parametrize("variants", [[], {"thumb": 7}, {"thumb": {"variants": {}}}], ids=str)
async def test_variants_that_cannot_be_read(env: MigrationEnvironment, ref: StoredObjectRef, variants: object) -> None:
    await env.set_raw(1, json.dumps({**ref.to_dict(), "variants": variants}))
    report = await verify(env.binding)
    assert [(f.problem, f.variant, f.is_replaceable) for f in report.findings] == [(Problem.UNDECODABLE, None, False)]


async def test_only_those_of_a_policy(env: MigrationEnvironment, ref: StoredObjectRef) -> None:
    whole = ref.to_dict()
    whole["variants"]["thumb"]["storage_key"] = "parcels"
    await env.set_raw(1, json.dumps(whole))
    await env.old.delete(variant(ref, "thumb").location)
    assert (await verify(env.binding, storage_key="docs")).checked == 2
    report = await verify(env.binding, storage_key="parcels")
    assert (report.checked, [f.variant for f in report.findings]) == (1, ["thumb"])


async def test_a_variant_that_is_replaced_meanwhile(
    env: MigrationEnvironment, ref: StoredObjectRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is read again before the missing variant of an old value is reported."""
    await env.old.delete(variant(ref, "thumb").location)
    original = Verification._compare

    async def replacing(self: Verification, *args: object) -> object:
        monkeypatch.setattr(Verification, "_compare", original)
        await give_variants(env, 1, thumb=b"new")
        return await original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Verification, "_compare", replacing)
    report = await verify(env.binding)
    assert (report.findings, report.complete) == ([], True)
