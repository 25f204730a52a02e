"""What autogenerate writes for columns of refs and for the journal's tables, with the templates that Alembic comes with."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.alembic.conftest import Target
from tests.alembic.project import Project

BEFORE = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

class Base(DeclarativeBase):
    pass

class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
"""
MODELS = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from granite_storage import Attachment, StoredObjectRef, StoredObjectRefType, attachment, journal_tables

class Base(DeclarativeBase):
    pass

class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("documents")
    plain: Mapped[StoredObjectRef | None] = mapped_column(StoredObjectRefType())

class Picture(Base):
    __tablename__ = "picture"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment] = attachment("pictures")

journal_tables(Base.metadata)
"""
NOTHING = "No new upgrade operations detected"


def test_from_models_to_tables_and_back(target: Target, tmp_path: Path) -> None:
    """New tables, new columns of a table that is there, and the journal."""
    project = Project.made(tmp_path, target.url, BEFORE, template=target.template)
    project.autogenerate("before")
    project.alembic("upgrade", "head")
    (tmp_path / "models.py").write_text(MODELS)
    written = project.autogenerate("files")
    assert written.count("portable_storage_ref_type()") == 3
    assert "from granite_storage import portable_storage_ref_type\n" in written
    assert "granite_storage_intent" in written
    project.alembic("upgrade", "head")
    assert NOTHING in project.alembic("check")
    project.alembic("downgrade", "-1")
    project.alembic("upgrade", "head")
    assert NOTHING in project.alembic("check")
    project.alembic("downgrade", "base")


def test_without_the_line_the_migration_does_not_run(tmp_path: Path) -> None:
    """It is the line that helps, not luck. In a process of its own: what the line does lasts as long as its process."""
    project = Project.made(tmp_path, make_url(f"sqlite:///{tmp_path}/app.db"), MODELS, template="generic", line="")
    done = project.alembic_process("revision", "--autogenerate", "-m", "files")
    assert done.returncode == 0, done.stdout
    assert "NameError" in project.alembic("upgrade", "head", fails=True)


@pytest.mark.parametrize(("driver", "template"), [("sqlite", "generic"), ("sqlite+aiosqlite", "async")])
def test_each_template_in_processes_of_their_own(driver: str, template: str, tmp_path: Path) -> None:
    project = Project.made(tmp_path, make_url(f"{driver}:///{tmp_path}/app.db"), MODELS, template=template)
    for command in (["revision", "--autogenerate", "-m", "files"], ["upgrade", "head"]):
        done = project.alembic_process(*command)
        assert done.returncode == 0, done.stdout
    assert "portable_storage_ref_type()" in project.versions().pop().read_text()
    assert NOTHING in project.alembic("check")


OWN_HOOKS = """from granite_storage.alembic import include_storage; include_storage(context); include_storage()

def own_item(kind, item, autogen_context):
    if kind == "type" and type(item).__name__ == "Money":
        autogen_context.imports.add("import models")
        return "models.Money()"
    return False

def own_directives(context, revision, directives):
    directives[0].message = "ours"

def own_comparison(context, inspected, declared, inspected_type, declared_type):
    return False if type(declared_type).__name__ == "Money" else None
"""


def test_hooks_of_the_project_go_on_to_work(tmp_path: Path) -> None:
    money = """
from sqlalchemy import Integer
from sqlalchemy.types import TypeDecorator

class Money(TypeDecorator):
    impl = Integer
    cache_ok = True

class Price(Base):
    __tablename__ = "price"
    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(Money())
    sheet: Mapped[Attachment | None] = attachment("sheets")
"""
    project = Project.made(tmp_path, make_url(f"sqlite:///{tmp_path}/app.db"), MODELS + money, template="generic", line=OWN_HOOKS)
    hooks = (
        "render_item=own_item, process_revision_directives=own_directives, compare_type=own_comparison, user_module_prefix='x.'"
    )
    project.replace("migrations/env.py", "render_as_batch=True", f"render_as_batch=True, {hooks}")
    written = project.autogenerate("theirs")
    assert "models.Money()" in written
    assert "portable_storage_ref_type()" in written
    assert '"""ours' in written
    project.alembic("upgrade", "head")
    assert NOTHING in project.alembic("check")
