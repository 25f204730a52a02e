"""The journal's triggers in migrations: what autogenerate writes for them, and what the database has then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import IntegrityError

from tests.alembic.conftest import Target
from tests.alembic.project import Project
from tests.alembic.test_autogenerate import BEFORE, MODELS, NOTHING

DECLARED = """
from granite_storage.orm import storage_triggers
storage_triggers(Base.metadata)
"""
OWN = "SELECT relname, tgname FROM pg_trigger JOIN pg_class c ON c.oid = tgrelid WHERE tgname LIKE '%granite%' ORDER BY 1, 2"


OWN_ON_MARIADB = """
    SELECT event_object_table, trigger_name FROM information_schema.triggers
    WHERE trigger_schema = DATABASE() AND trigger_name LIKE '%granite%' ORDER BY 1, 2
"""


INDEXES = "SELECT indexname FROM pg_indexes WHERE indexname LIKE 'ix_granite_storage_location_%plain'"
INDEXES_ON_MARIADB = """
    SELECT DISTINCT index_name FROM information_schema.statistics
    WHERE table_schema = DATABASE() AND index_name LIKE 'ix_granite_storage_location_%plain'
"""
GENERATED_ON_MARIADB = """
    SELECT column_name FROM information_schema.columns
    WHERE table_schema = DATABASE() AND table_name = 'document' AND column_name LIKE 'granite_storage%plain'
"""


@pytest.fixture(scope="session", params=["asyncpg", "mariadb"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which database; its server runs before a test is watched."""
    if request.param == "asyncpg":
        request.getfixturevalue("postgres_server")
    return str(request.param)


def is_mariadb(target: Target) -> bool:
    return target.url.get_backend_name() != "postgresql"


def own(target: Target) -> list[Any]:
    return target.ask(OWN_ON_MARIADB if is_mariadb(target) else OWN)


def guarded(target: Target) -> set[Any]:
    return {name for name, _ in own(target)}


def test_from_models_to_triggers_and_back(target: Target, tmp_path: Path) -> None:
    """With new tables, in a migration of their own, after a change of columns, and when the models declare them no more."""
    project = Project.made(tmp_path, target.url, MODELS + DECLARED, template=target.template)
    written = project.autogenerate("files")
    assert "create_storage_triggers(op, {'document': ['file'], 'picture': ['file']}, plain={'document': ['plain']})" in written
    project.alembic("upgrade", "head")
    assert guarded(target) == {"document", "picture"}
    assert NOTHING in project.alembic("check")
    with pytest.raises(IntegrityError, match="gone or going"):
        target.ask_nothing("""INSERT INTO picture (id, file) VALUES (1, '{"location" : "unknown"}')""")

    changed = MODELS.replace("    plain: Mapped[StoredObjectRef | None] = mapped_column(StoredObjectRefType())\n", "")
    changed = changed.replace("file: Mapped[Attachment | None]", "scan: Mapped[Attachment | None]")
    (tmp_path / "models.py").write_text(changed + DECLARED)
    written = project.autogenerate("columns")
    assert written.index("drop_storage_triggers(op, ['document'])") < written.index("drop_column")
    if is_mariadb(target):  # MariaDB drops no column that a generated one depends on
        assert written.index("drop_location_index(op, 'document', 'plain')") < written.index("drop_column")
    assert "create_storage_triggers(op, {'document': ['scan'], 'picture': ['file']})" in written
    project.alembic("upgrade", "head")
    assert guarded(target) == {"document", "picture"}
    assert NOTHING in project.alembic("check")

    (tmp_path / "models.py").write_text(changed)
    assert "drop_storage_triggers(op, ['document', 'picture'])" in project.autogenerate("none")
    project.alembic("upgrade", "head")
    assert guarded(target) == set()
    if target.template != "async":
        assert target.ask("SELECT proname FROM pg_proc WHERE proname LIKE 'granite%'") == []
    assert NOTHING in project.alembic("check")
    project.alembic("downgrade", "base")


def test_what_was_changed_past_migrations(target: Target, tmp_path: Path) -> None:
    project = Project.made(tmp_path, target.url, MODELS + DECLARED, template=target.template)
    project.autogenerate("files")
    project.alembic("upgrade", "head")
    name = "granite_storage_delete_picture" if is_mariadb(target) else "granite_storage_delete ON picture"
    target.ask_nothing(f"DROP TRIGGER {name}")
    assert "create_storage_triggers" in project.autogenerate("again")
    project.alembic("upgrade", "head")
    assert NOTHING in project.alembic("check")


def test_a_column_that_was_dropped_past_migrations(target: Target, tmp_path: Path) -> None:
    """Its index over locations has gone with it, which guards look in, though no trigger has changed."""
    project = Project.made(tmp_path, target.url, MODELS + DECLARED, template=target.template)
    project.autogenerate("files")
    project.alembic("upgrade", "head")
    before = own(target)
    if is_mariadb(target):
        [[generated]] = target.ask(GENERATED_ON_MARIADB)
        target.ask_nothing(f"ALTER TABLE document DROP COLUMN {generated}")
    target.ask_nothing("ALTER TABLE document DROP COLUMN plain")
    assert own(target) == before
    written = project.autogenerate("again")
    assert written.index("add_column") < written.index("create_storage_triggers(op")
    project.alembic("upgrade", "head")
    assert target.ask(INDEXES_ON_MARIADB if is_mariadb(target) else INDEXES) == [("ix_granite_storage_location_document_plain",)]
    assert NOTHING in project.alembic("check")


def test_beside_a_worker_of_an_older_version(target: Target, tmp_path: Path) -> None:
    project = Project.made(tmp_path, target.url, MODELS, template=target.template)
    project.autogenerate("files")
    project.alembic("upgrade", "head")
    (tmp_path / "models.py").write_text(MODELS + DECLARED)
    project.autogenerate("triggers")
    target.ask_nothing("INSERT INTO granite_storage_meta VALUES ('heartbeat', '30', now())")
    assert "a worker of an older version" in project.alembic("upgrade", "head", fails=True)
    assert guarded(target) == set()
    target.ask_nothing("UPDATE granite_storage_meta SET changed = '2020-01-01 00:00:00'")
    project.alembic("upgrade", "head")
    assert guarded(target) == {"document", "picture"}


def test_without_a_database(target: Target, tmp_path: Path) -> None:
    project = Project.made(tmp_path, target.url, MODELS + DECLARED, template=target.template)
    project.autogenerate("files")
    assert "creating triggers needs the database" in project.alembic("upgrade", "head", "--sql", fails=True)


UNREFLECTED = "ignore"
"""SQLAlchemy warns on SQLite of each index over locations that it leaves out."""

CODE = "    code: Mapped[int | None] = mapped_column(index=True, unique=True)\n"
UNKNOWN = "INSERT INTO picture (id, file) VALUES (1, json_object('location', 'unknown'))"


def test_on_sqlite(tmp_path: Path) -> None:
    """Batch mode puts new tables in the places of old ones, which triggers of any table must not name meanwhile."""
    target = Target(make_url(f"sqlite:///{tmp_path}/app.db"), "generic")
    own = "SELECT tbl_name, name FROM sqlite_master WHERE type = 'trigger' ORDER BY 1, 2"
    project = Project.made(tmp_path, target.url, MODELS + DECLARED, template=target.template)
    written = project.autogenerate("files")
    assert "create_storage_triggers(op, {'document': ['file'], 'picture': ['file']}, plain={'document': ['plain']})" in written
    project.alembic("upgrade", "head")
    made = target.ask(own)
    assert {name for name, _ in made} == {"document", "picture"}
    assert NOTHING in project.alembic("check", filters=UNREFLECTED)
    with pytest.raises(IntegrityError, match="gone or going"):
        target.ask_nothing(UNKNOWN)

    unique = MODELS.replace("    plain: Mapped", CODE + "    plain: Mapped")
    unique = unique.replace("file: Mapped[Attachment] =", "file: Mapped[Attachment | None] =")
    (tmp_path / "models.py").write_text(unique + DECLARED)
    written = project.autogenerate("unique", filters=UNREFLECTED)
    assert written.index("drop_storage_triggers(op, ['document', 'picture'])") < written.index("batch_alter_table")
    assert written.index("batch_alter_table") < written.index("create_storage_triggers(op")
    project.alembic("upgrade", "head", filters=UNREFLECTED)
    assert len(target.ask(own)) == len(made)
    assert target.ask("SELECT sql FROM sqlite_master WHERE name = 'granite_storage_replace_document' AND sql LIKE '%\"code\"%'")
    assert NOTHING in project.alembic("check", filters=UNREFLECTED)
    with pytest.raises(IntegrityError, match="gone or going"):
        target.ask_nothing(UNKNOWN)

    (tmp_path / "models.py").write_text(unique)
    assert "drop_storage_triggers(op, ['document', 'picture'])" in project.autogenerate("none", filters=UNREFLECTED)
    project.alembic("upgrade", "head", filters=UNREFLECTED)
    assert target.ask(own) == []
    assert NOTHING in project.alembic("check", filters=UNREFLECTED)
    project.alembic("downgrade", "base", filters=UNREFLECTED)


@pytest.mark.parametrize("kind", ["sqlite", "asyncpg", "mariadb"], indirect=True)
@pytest.mark.parametrize("as_batch", [False, True])
def test_columns_with_an_index_go(target: Target, tmp_path: Path, as_batch: bool) -> None:
    """The index that triggers need outlives them; neither a migration that drops its column nor a downgrade fails by it."""
    project = Project.made(tmp_path, target.url, BEFORE, template=target.template, as_batch=as_batch)
    project.autogenerate("before")
    project.alembic("upgrade", "head")
    (tmp_path / "models.py").write_text(MODELS)
    project.autogenerate("files")
    project.alembic("upgrade", "head")
    (tmp_path / "models.py").write_text(MODELS + DECLARED)
    project.autogenerate("triggers", filters=UNREFLECTED)
    project.alembic("upgrade", "head", filters=UNREFLECTED)
    project.alembic("downgrade", "base", filters=UNREFLECTED)
    project.alembic("upgrade", "head", filters=UNREFLECTED)
    assert NOTHING in project.alembic("check", filters=UNREFLECTED)

    (tmp_path / "models.py").write_text(BEFORE)
    project.autogenerate("none", filters=UNREFLECTED)
    project.alembic("upgrade", "head", filters=UNREFLECTED)
    assert target.columns("document") == {"id"}
    target.ask_nothing("INSERT INTO document VALUES (1)")  # no trigger is left that names what is gone
