"""The output of the command: streams, colours, and the escaping of what clients have sent."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from granite_storage._documentation import Page
from granite_storage.cli.output import escape_text, format_size
from granite_storage.cli.runtime import ByteCount
from tests.cli.conftest import ROOT, Shop

HOSTILE = "a\u202egnp.exe\x1b[2J\x07.txt"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Jährlicher Bericht – 年報.pdf", "Jährlicher Bericht – 年報.pdf"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("a\r\nb\x00\x9b", "a\\x0d\\x0ab\\x00\\x9b"),
        ("\ud800\u2028", "\\ud800\\u2028"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_nothing_that_a_terminal_obeys(text: str, expected: str) -> None:
    assert escape_text(text) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (123_456, "123 kB"), (5.5e15, "5.5 PB")],
)
def test_sizes(size: float, expected: str) -> None:
    assert format_size(size) == expected


@pytest.mark.parametrize(("text", "expected"), [("10", 10), ("10MB", 10e6), ("1.5 GiB/s", 1.5 * 2**30), ("7k", 7000)])
def test_byte_counts(text: str, expected: float) -> None:
    assert ByteCount().convert(text, None, None) == expected


def test_hostile_names_in_findings(plain_shop: Shop) -> None:
    """The location is made safe at the upload; what a row says may have been written by anything."""
    plain_shop.fill(1)
    with contextlib.closing(sqlite3.connect(plain_shop.folder / "shop.db")) as connection, connection:
        changed = ("$.location", "x/\x1b[31m\u202ey")
        connection.execute("UPDATE shop_document SET file = json_set(file, ?, ?)", changed)
    answer = plain_shop.run("verify")
    assert answer.code == 1
    assert not {"\x1b", "\u202e"} & set(answer.out + answer.err)
    answer = plain_shop.run("verify", "--json")
    assert answer.out.isascii()
    assert answer.records[0]["ref"]["location"] == "x/\x1b[31m\u202ey"


def test_hostile_addresses(plain_shop: Shop) -> None:
    plain_shop.fill(1)
    answer = plain_shop.run("stat", f"old:{HOSTILE}")
    assert not {"\x1b", "\u202e", "\x07"} & set(answer.out + answer.err)


def test_no_colours_when_piped(plain_shop: Shop) -> None:
    plain_shop.fill(1)
    plain_shop.files("old")[0].unlink()
    for command in (["verify"], ["doctor"], ["ls"], ["--help"]):
        answer = plain_shop.run(*command)
        assert "\x1b" not in answer.out + answer.err


def test_logs_of_the_application_are_not_the_answer(plain_shop: Shop) -> None:
    plain_shop.fill(1)
    answer = plain_shop.run("verify", "--json", ECHO="1")
    assert len(answer.records) == 1
    assert "SELECT" in answer.err


class TestApp:
    @pytest.mark.parametrize("app", ["shop:binding", "shop:later", "shop:settings.nested"])
    def test_a_callable_of_any_kind(self, plain_shop: Shop, app: str) -> None:
        plain_shop.fill(1)
        assert plain_shop.run("--app", app, "verify").code == 0

    @pytest.mark.parametrize(
        ("app", "said"),
        [
            ("shop", "module:attribute"),
            (":binding", "module:attribute"),
            ("nothing:binding", "no module 'nothing'"),
            ("shop.nothing:binding", "no module 'shop.nothing'"),
            ("shop:nothing", "no 'nothing'"),
            ("shop:number", "is a int"),
            ("shop:broken", "KeyError: 'S3_BUCKET'"),
        ],
    )
    def test_what_is_no_binding(self, plain_shop: Shop, app: str, said: str) -> None:
        answer = plain_shop.run("--app", app, "verify")
        assert (answer.code, answer.out) == (3, "")
        assert said in answer.err
        assert "Traceback" not in answer.err

    def test_an_error_leads_to_its_page(self, plain_shop: Shop) -> None:
        said = plain_shop.run("--app", "shop", "verify").err.splitlines()
        assert f"see {Page.COMMAND_LINE.url}" in said

    def test_a_module_that_fails_says_where(self, plain_shop: Shop) -> None:
        (plain_shop.folder / "bad.py").write_text("import os\nURL = os.environ['NO_SUCH_VARIABLE']\n")
        answer = plain_shop.run("--app", "bad:binding", "verify")
        assert answer.code == 3
        assert "KeyError: 'NO_SUCH_VARIABLE'" in answer.err
        assert "line 2" in answer.err
        assert "Traceback" not in answer.err
        assert "Traceback" in plain_shop.run("--app", "bad:binding", "--debug", "verify").err

    def test_a_module_that_imports_what_is_missing(self, plain_shop: Shop) -> None:
        (plain_shop.folder / "bad.py").write_text("import no_such_package\n")
        answer = plain_shop.run("--app", "bad:binding", "verify")
        assert "No module named 'no_such_package'" in answer.err
        assert "bad.py" in answer.err

    def test_another_folder(self, plain_shop: Shop) -> None:
        inner = plain_shop.folder / "src"
        inner.mkdir()
        (plain_shop.folder / "shop.py").rename(inner / "shop.py")
        assert plain_shop.run("ls").code == 3
        assert plain_shop.run("--app-dir", "src", "ls").code == 0

    def test_no_app(self, plain_shop: Shop) -> None:
        answer = plain_shop.run("ls", GRANITE_STORAGE_APP="")
        assert answer.code == 2
        assert "--app" in answer.err


def test_the_installed_command() -> None:
    command = [str(Path(sys.executable).with_name("granite-storage")), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert version("granite-storage") in done.stdout


@pytest.mark.parametrize("package", ["click", "rich"])
def test_without_the_extra(package: str) -> None:
    program = f"import sys; sys.modules[{package!r}] = None\nfrom granite_storage.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert 'pip install "granite-storage[cli]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_help_of_each_command(plain_shop: Shop) -> None:
    names = ("cp", "doctor", "gc", "ls", "migrate", "recover", "stat", "verify")
    listed = plain_shop.run("--help").out
    for name in names:
        assert f"  {name} " in listed
        assert plain_shop.run(name, "--help").code == 0
