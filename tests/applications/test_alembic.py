"""An application with plain sessions that turns a column of bytes into attachments, by a migration on a synchronous engine."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from sqlalchemy import create_engine, make_url, text
from sqlalchemy.orm import sessionmaker

from granite_storage import Attachment, bind_storage
from tests.alembic.project import Project
from tests.core.support import files_below
from tests.programs import program

MODELS = """
from pathlib import Path

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import Attachment, StorageManager, StoragePolicy, attachment
from granite_storage.backends.local import LocalStorageBackend

class Base(DeclarativeBase):
    pass

class User(Base):
    __tablename__ = "user_account"

    id: Mapped[int] = mapped_column(primary_key=True)
    avatar: Mapped[Attachment | None] = attachment("avatars")

storage = StorageManager(
    backends={"local": LocalStorageBackend(Path(__file__).parent / "files", fsync=False)},
    policies={"avatars": StoragePolicy("avatars", "local")},
)
"""

FIRST = """
import sqlalchemy as sa
from alembic import op

def upgrade():
    op.create_table(
        "user_account", sa.Column("id", sa.Integer, primary_key=True), sa.Column("picture", sa.LargeBinary)
    )
    rows = [{"id": 1, "picture": b"one"}, {"id": 2, "picture": None}, {"id": 3, "picture": b"three"}]
    op.bulk_insert(sa.table("user_account", sa.column("id"), sa.column("picture", sa.LargeBinary)), rows)

def downgrade():
    op.drop_table("user_account")
"""

SECOND = """
import sqlalchemy as sa
from alembic import op

from granite_storage.alembic import (
    add_column_once, add_storage_column, blob_to_storage, drop_converted_column, drop_restored_column, storage_to_blob
)
from models import storage

def upgrade():
    add_storage_column(op, "user_account", "avatar")
    blob_to_storage(op, storage, "user_account", "picture", "avatar", storage_key="avatars")
    drop_converted_column(op, storage, "user_account", "picture", "avatar")

def downgrade():
    add_column_once(op, "user_account", sa.Column("picture", sa.LargeBinary))
    storage_to_blob(op, storage, "user_account", "avatar", "picture")
    drop_restored_column(op, "user_account", "avatar", "picture")
"""


def test_bytes_become_attachments_and_back(tmp_path: Path, database_url: str) -> None:
    project = Project.made(tmp_path, make_url(database_url), MODELS, template="generic")
    project.revision("first", FIRST)
    project.revision("second", SECOND, down="first")
    project.alembic("upgrade", "head")
    project.alembic("check")

    engine = create_engine(database_url)
    sessions = sessionmaker(engine)
    with program(tmp_path, os.environ.copy()):
        sys.path.insert(0, str(tmp_path))
        models = importlib.import_module("models")
        binding = bind_storage(models.Base, models.storage, session_factory=sessions)
        with sessions.begin() as session:
            assert session.get_one(models.User, 1).avatar.sync.read() == b"one"
            assert session.get_one(models.User, 2).avatar is None
            session.get_one(models.User, 1).avatar = Attachment(b"another")
            session.delete(session.get_one(models.User, 3))
        assert [(tmp_path / "files" / name).read_bytes() for name in files_below(tmp_path / "files")] == [b"another"]
        binding.unbind()
        models.storage.sync.close()

    project.alembic("downgrade", "first")
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT id, picture FROM user_account ORDER BY id")).all()
    engine.dispose()
    assert [(number, picture and bytes(picture)) for number, picture in rows] == [(1, b"another"), (2, None)]
