"""What `granite-storage doctor` says of rows that lead to another store than they did."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Shop


def verdicts(shop: Shop, **environment: str) -> tuple[int, list[tuple[str, str]]]:
    answer = shop.run("doctor", "--json", "--read-only", **environment)
    found = [(record["result"], record["message"]) for record in answer.records if record["what"] in ("references", "backends")]
    return answer.code, found


@pytest.mark.case("RA-03")
def test_rows_of_another_store(plain_shop: Shop) -> None:
    plain_shop.fill(2)
    assert verdicts(plain_shop) == (0, [("ok", "2 references lead to the store that they were written to")])
    (plain_shop.folder / "old").rename(plain_shop.folder / "away")
    code, [(verdict, message)] = verdicts(plain_shop)
    assert (code, verdict) == (1, "bad")
    assert "2 references lead to another store than before" in message
    assert "its disk is not mounted" in message
    (plain_shop.folder / "old").mkdir()
    (plain_shop.folder / "old/.granite-storage").write_text("another-store\n")
    assert "leads to the store another-store now" in verdicts(plain_shop)[1][0][1]


@pytest.mark.case("RA-01", "RA-02")
def test_renamed_keys_and_two_keys_for_one_place(plain_shop: Shop) -> None:
    plain_shop.fill(2)
    program = (plain_shop.folder / "shop.py").read_text()
    (plain_shop.folder / "shop.py").write_text(
        program.replace('("old", "new")', '("disk", "new")').replace('"WRITE_TO", "old"', '"WRITE_TO", "disk"')
    )
    code, [(verdict, message)] = verdicts(plain_shop)
    assert (code, verdict) == (1, "bad")
    assert message == "2 references name the backend 'old', which the manager does not have (there are: disk, new)"
    (plain_shop.folder / "shop.py").write_text(program)
    (plain_shop.folder / "new").symlink_to(plain_shop.folder / "old")
    assert ("bad", "'new' and 'old' lead to the same objects: give the manager one backend for each store") in verdicts(
        plain_shop
    )[1]
