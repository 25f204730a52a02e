"""The application of `template`, in the shape of FastAPI's full-stack template, before and after it is given an avatar."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.support import PROJECT, files_below

HERE = Path(__file__).parent

EDITS = {
    "app/models.py": [
        (
            "from sqlmodel import Field, Relationship, SQLModel\n",
            "from granite_storage import Attachment, AttachmentType\n"
            "from sqlalchemy import Column\n"
            "from sqlmodel import Field, Relationship, SQLModel\n",
        ),
        (
            "    hashed_password: str\n",
            "    hashed_password: str\n"
            '    avatar: Attachment | None = Field(default=None, sa_column=Column(AttachmentType("avatars")))\n',
        ),
        ("class UserPublic(UserBase):\n", "class UserPublic(UserBase):\n    avatar: Attachment | None = None\n"),
    ],
    "app/core/db.py": [
        (
            "from sqlmodel import Session, create_engine, select\n",
            "from granite_storage import bind_storage\n"
            "from sqlalchemy.orm import sessionmaker\n"
            "from sqlmodel import Session, SQLModel, create_engine, select\n"
            "from app.core.storage import storage\n",
        ),
        (
            "engine = create_engine(settings.SQLALCHEMY_DATABASE_URI)\n",
            "engine = create_engine(settings.SQLALCHEMY_DATABASE_URI)\n"
            "bind_storage(SQLModel, storage, session_factory=sessionmaker(engine, class_=Session))\n",
        ),
    ],
    "app/api/main.py": [
        ("import items, login, users\n", "import avatars, items, login, users\n"),
        (
            "api_router.include_router(items.router)\n",
            "api_router.include_router(items.router)\napi_router.include_router(avatars.router)\n",
        ),
    ],
    "app/main.py": [
        ("import FastAPI\n", "import FastAPI\nfrom granite_storage.web import install_error_handlers\n"),
        ("app.include_router", "install_error_handlers(app)\napp.include_router"),
    ],
    "app/alembic/env.py": [
        (
            "from alembic import context\n",
            "from alembic import context\nfrom granite_storage.alembic import include_storage; include_storage(context)\n",
        ),
    ],
}
"""What gives the users of the template an avatar, beside the files of `avatar`."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(HERE / "template", tmp_path / "project", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "project"


@pytest.mark.exhaustive("eight programs for what test_alembic.py, test_fastapi.py and test_sessions.py do in this one")
def test_an_avatar_is_added(project: Path, tmp_path: Path, postgres_url: str) -> None:
    environment = {
        **os.environ,
        "DATABASE_URL": postgres_url,
        "STORAGE_FOLDER": str(tmp_path / "files"),
        "PYTHONPATH": str(PROJECT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("alembic", "upgrade", "head")
    assert "14 passed" in run("pytest", "-q")

    shutil.copytree(HERE / "avatar", project, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name, edits in EDITS.items():
        text = (project / name).read_text()
        for old, new in edits:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (project / name).write_text(text)
    run("alembic", "revision", "--autogenerate", "-m", "avatar")
    run("alembic", "upgrade", "head")
    run("alembic", "check")
    assert "22 passed" in run("pytest", "-q")
    assert files_below(tmp_path / "files") == []
