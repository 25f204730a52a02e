"""The commands on an application whose sessions need an application context."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Shop
from tests.programs import program

pytest.importorskip("flask_sqlalchemy")


@pytest.fixture
def flask_shop(tmp_path: Path) -> Shop:
    shutil.copy(Path(__file__).with_name("flask_shop.py"), tmp_path / "flask_shop.py")
    shop = Shop(tmp_path, "", journaled=False)
    with program(shop.folder, shop.environment()):
        sys.path.insert(0, str(shop.folder))
        importlib.import_module("flask_shop").fill(3)
    return shop


COMMANDS = (
    ("doctor",),
    ("verify", "--deep"),
    ("gc", "--yes"),
    ("recover", "--dry-run"),
    ("recover", "--yes"),
    ("derive",),
    ("ls",),
    ("ls", "old:"),
)


@pytest.mark.parametrize("name", ["in_context", "in_context_later"])
def test_a_callable_that_pushes_a_context(flask_shop: Shop, name: str) -> None:
    app = {"GRANITE_STORAGE_APP": f"flask_shop:{name}"}
    for command in COMMANDS:
        answer = flask_shop.run(*command, **app)
        assert answer.code == 0, (command, answer.out, answer.err)
    answer = flask_shop.run("migrate", "--storage-key", "documents", "--to", "new", "--yes", **app, WRITE_TO="new")
    assert (answer.code, len(flask_shop.files("new"))) == (0, 3), answer.err


@pytest.mark.parametrize("command", [("doctor",), ("verify",), ("gc",), ("recover", "--dry-run"), ("derive",)])
def test_without_a_context_the_error_says_what_to_do(flask_shop: Shop, command: tuple[str, ...]) -> None:
    answer = flask_shop.run(*command, GRANITE_STORAGE_APP="flask_shop:binding")
    assert answer.code == 3
    assert "let --app name a function that pushes one" in answer.err
    assert "unexpected" not in answer.err
