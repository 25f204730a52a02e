"""What commands say of wrong options and addresses, in words of the command line, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest

from granite_storage._words import count_of, describe_duration
from granite_storage.cli.output import option_after
from granite_storage.cli.runtime import in_options
from granite_storage.locations import uuid7_hex
from tests.cli.conftest import Shop

LOUD = {"VARIANTS": "loud", "RECIPE": "1"}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("gc --storage-key nothing", "--storage-key: no policy has the storage key 'nothing'"),
        ("gc --storage-key documents --storage-key nothing --yes", "--storage-key: no policy"),
        ("verify --storage-key nothing", "--storage-key: no policy"),
        ("migrate --storage-key nothing --to new", "--storage-key: no policy"),
        ("migrate --storage-key documents --to nope --yes", r"--to: .*'nope' \(there are: new, old\)"),
        ("derive --column documents.nothing", "--column: 'documents.nothing' is not an attachment column"),
        ("derive --variant nothing", "--variant: no column declares a variant or an effect 'nothing'"),
        ("derive --after qqq", "--after: 'qqq' is not the key of a row"),
        ("verify --after qqq", "--after: 'qqq' is not the key of a row"),
        ("migrate --storage-key documents --to old --after qqq --yes", "--after: 'qqq' is not the key of a row"),
        ("derive --all --only-missing", "exclude each other"),
        ("derive --stale --all", "exclude each other"),
        ("ls old:../", "the prefix '../': "),
        ("ls nope:", "the address 'nope:': .*'nope'"),
        ("stat nope:x", "the address 'nope:x': "),
        ("cp shop.py documents:sub/x", "the location of a new object is generated, and cannot be 'sub/x'"),
        ("cp . documents:", "SOURCE must be a file, and '.' is a folder"),
        ("cp nothing.txt documents:", "SOURCE must be a file, and 'nothing.txt' does not exist"),
    ],
)
def test_what_cannot_be(plain_shop: Shop, command: str, said: str) -> None:
    plain_shop.fill(1)
    answer = plain_shop.run(*command.split(), **LOUD)
    assert (answer.code, answer.out) == (2, ""), answer.err
    assert re.search(said, answer.err), answer.err
    assert "To continue" not in answer.err
    assert len(plain_shop.files("old")) == 1


def test_flags_that_exclude_each_other_without_an_application(plain_shop: Shop) -> None:
    answer = plain_shop.run("--app", "nothing:binding", "derive", "--stale", "--all")
    assert (answer.code, answer.out) == (2, "")
    assert "exclude each other" in answer.err


def test_prefixes_of_characters(plain_shop: Shop) -> None:
    plain_shop.fill(1)
    for prefix in ("shop", "shop_document/", "shop_document/1/file/0"):
        assert len(plain_shop.run("ls", f"old:{prefix}").out.splitlines()) == 1


def test_a_file_that_cannot_be_written_to(plain_shop: Shop) -> None:
    plain_shop.fill(1)
    (plain_shop.folder / "target").mkdir()
    (plain_shop.folder / "target" / plain_shop.files("old")[0].name).mkdir()
    answer = plain_shop.run("cp", f"old:{plain_shop.location()}", "target", "--force")
    assert answer.code == 3
    assert re.search(r"error: \S+: Is a directory", answer.err), answer.err


def test_each_message_names_options(plain_shop: Shop) -> None:
    plain_shop.fill(1)
    [path] = plain_shop.files("old")
    path.rename(path.with_name(f"{uuid7_hex()}-a.pdf"))
    for found in plain_shop.files("old"):
        os.utime(found, (1, 1))
    answer = plain_shop.run("gc", "--yes")
    assert answer.code == 3
    assert "the only object of 'documents'" in answer.err
    assert "pass --allow-no-references" in answer.err
    assert "allow_no_references" not in answer.err
    assert "To continue" not in answer.err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("pass allow_restored_database=True", "pass --allow-restored-database"),
        ("confirm it: await journal.allow_restored_database()", "confirm it: granite-storage gc --allow-restored-database"),
        ("verify() finds all", "granite-storage verify finds all"),
        ("pass iter_references, which reads both", "collect in Python with iter_references, which reads both"),
    ],
)
def test_options(text: str, shown: str) -> None:
    assert in_options(text) == shown


@pytest.mark.parametrize(
    ("duration", "words"),
    [
        (timedelta(days=30, minutes=7, seconds=9.5), "30 days"),
        (timedelta(days=1, hours=2, minutes=3), "1 day 2 hours"),
        (timedelta(minutes=15), "15 minutes"),
        (timedelta(hours=1, minutes=1, seconds=59), "1 hour 1 minute"),
        (timedelta(seconds=1), "1 second"),
        (timedelta(0), "0 seconds"),
        (timedelta(seconds=59.9), "1 minute"),
    ],
)
def test_durations(duration: timedelta, words: str) -> None:
    assert describe_duration(duration) == words


@pytest.mark.parametrize("text", ["a", "it's", "a'; touch injected; echo '", "$(touch injected) `touch injected`", "a\nb", "é"])
def test_a_key_in_a_shell(tmp_path: Path, text: str) -> None:
    """What a command says to continue with goes into a shell: the key is one word of it, whatever a row has in its key."""
    key = json.dumps(["documents", text])
    command = ["sh", "-c", f"printf '%s\\n' {option_after(key)}"]
    shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert shown == f"--after\n{key}\n"
    assert list(tmp_path.iterdir()) == []


def test_counts() -> None:
    assert [count_of(number, "row has", "rows have") for number in (0, 1, 1000)] == [
        "0 rows have",
        "1 row has",
        "1,000 rows have",
    ]
    assert [count_of(number, "table") for number in (1, 2)] == ["1 table", "2 tables"]
