"""A project as a user has it: what `alembic init` makes, models, and the one line."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import URL

from tests.core.support import PROJECT

LINE = "from granite_storage.alembic import include_storage; include_storage(context)"
NO_MODELS = """
from sqlalchemy.orm import DeclarativeBase

class Base(DeclarativeBase):
    pass
"""


@dataclass(frozen=True)
class Project:
    """A folder with an Alembic environment in it."""

    folder: Path

    @classmethod
    def made(cls, folder: Path, url: URL, models: str, *, template: str, line: str = LINE) -> Project:
        """Let Alembic make the environment, and put in what its documentation and ours say."""
        project = cls(folder)
        project.alembic("init", "-t", template, "migrations")
        (folder / "models.py").write_text(models)
        project.replace(
            "alembic.ini", "driver://user:pass@localhost/dbname", url.render_as_string(hide_password=False).replace("%", "%%")
        )
        project.replace(
            "migrations/env.py", "target_metadata = None", f"import models\ntarget_metadata = models.Base.metadata\n{line}"
        )
        if url.get_backend_name() == "sqlite":
            project.replace(
                "migrations/env.py", "target_metadata=target_metadata", "target_metadata=target_metadata, render_as_batch=True"
            )
        return project

    def replace(self, name: str, old: str, new: str) -> None:
        path = self.folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def alembic(self, *arguments: str, fails: bool = False, env: dict[str, str] | None = None, warnings: str = "error") -> str:
        """Run the command, and return what it says."""
        done = subprocess.run(
            [sys.executable, "-W", warnings, "-m", "alembic", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(PROJECT), **(env or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        said = done.stdout + done.stderr
        assert (done.returncode != 0) is fails, said
        return said

    def autogenerate(self, message: str) -> str:
        """Let Alembic write a migration, and return it."""
        before = self.versions()
        self.alembic("revision", "--autogenerate", "-m", message)
        return (self.versions() - before).pop().read_text()

    def versions(self) -> set[Path]:
        return set((self.folder / "migrations/versions").glob("*.py"))

    def revision(self, name: str, source: str, *, down: str | None = None) -> None:
        """Write a migration by hand."""
        head = f"revision = {name!r}\ndown_revision = {down!r}\n"
        (self.folder / f"migrations/versions/{name}.py").write_text(head + source)
