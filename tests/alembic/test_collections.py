"""The tables that `attachments` generates: autogenerate writes them as any others, and finds nothing to change afterwards."""

from __future__ import annotations

from pathlib import Path

from tests.alembic.conftest import Target
from tests.alembic.project import Project

NOTHING = "No new upgrade operations detected"
BEFORE = """
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from granite_storage.orm import AttachmentList, attachments

class Base(DeclarativeBase):
    pass

class Album(Base):
    __tablename__ = "album"
    id: Mapped[int] = mapped_column(primary_key=True)
"""
MODELS = (
    BEFORE
    + """\
    photos: Mapped[AttachmentList] = attachments("photos", max_files=20)

class Series(Base):
    __tablename__ = "series"
    owner: Mapped[str] = mapped_column(String(20), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    pages: Mapped[AttachmentList] = attachments("photos")
"""
)


def test_upgrades_and_downgrades(target: Target, tmp_path: Path) -> None:
    project = Project.made(tmp_path, target.url, BEFORE, template=target.template)
    project.autogenerate("before")
    project.alembic("upgrade", "head")
    (tmp_path / "models.py").write_text(MODELS)
    written = project.autogenerate("files")
    assert written.count("portable_storage_ref_type()") == 2
    project.alembic("upgrade", "head")
    assert {"album_photos", "series_pages"} <= target.tables()
    assert target.columns("series_pages") == {"id", "parent_owner", "parent_number", "position", "file", "caption", "extra"}
    assert NOTHING in project.alembic("check")
    project.alembic("downgrade", "-1")
    assert not {"album_photos", "series_pages"} & target.tables()
    project.alembic("upgrade", "head")
    assert NOTHING in project.alembic("check")
    project.alembic("downgrade", "base")
