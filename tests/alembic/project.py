"""A project as a user has it: what `alembic init` makes, models, and the one line."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alembic.config import CommandLine, Config
from sqlalchemy.engine import URL

from tests.core.support import PROJECT
from tests.programs import program

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
    def made(cls, folder: Path, url: URL, models: str, *, template: str, line: str = LINE, as_batch: bool = True) -> Project:
        """Let Alembic make the environment, and put in what its documentation and ours say; on SQLite with batch operations."""
        project = cls(folder)
        project.alembic("init", "-t", template, "migrations")
        (folder / "models.py").write_text(models)
        project.replace(
            "alembic.ini", "driver://user:pass@localhost/dbname", url.render_as_string(hide_password=False).replace("%", "%%")
        )
        project.replace(
            "migrations/env.py", "target_metadata = None", f"import models\ntarget_metadata = models.Base.metadata\n{line}"
        )
        if as_batch and url.get_backend_name() == "sqlite":
            project.replace(
                "migrations/env.py", "target_metadata=target_metadata", "target_metadata=target_metadata, render_as_batch=True"
            )
        return project

    def replace(self, name: str, old: str, new: str) -> None:
        path = self.folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def alembic(self, *arguments: str, fails: bool = False, env: dict[str, str] | None = None, filters: str = "error") -> str:
        """Run the command in this process, and return what it says; `filters` is what becomes of warnings."""
        said = io.StringIO()
        with (
            program(self.folder, {**os.environ, **(env or {})}),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter(filters)  # type: ignore[arg-type]
            has_failed = not _has_succeeded(arguments, said)
        assert has_failed is fails, said.getvalue()
        return said.getvalue()

    def alembic_process(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run the command in a process of its own, whose standard output has all that it says."""
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "alembic", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(PROJECT), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def autogenerate(self, message: str, *, filters: str = "error") -> str:
        """Let Alembic write a migration, and return it; `filters` is what becomes of warnings."""
        before = self.versions()
        self.alembic("revision", "--autogenerate", "-m", message, filters=filters)
        return (self.versions() - before).pop().read_text()

    def versions(self) -> set[Path]:
        return set((self.folder / "migrations/versions").glob("*.py"))

    def revision(self, name: str, source: str, *, down: str | None = None) -> None:
        """Write a migration by hand."""
        head = f"revision = {name!r}\ndown_revision = {down!r}\n"
        (self.folder / f"migrations/versions/{name}.py").write_text(head + source)


def _has_succeeded(arguments: Sequence[str], stdout: io.StringIO) -> bool:
    """Do what `alembic` does with the arguments."""
    line = CommandLine(prog="alembic")
    options = line.parser.parse_args(arguments)
    try:
        line.run_cmd(Config("alembic.ini", stdout=stdout, cmd_opts=options), options)
    except SystemExit as ended:
        return not ended.code
    except Exception:  # noqa: BLE001  # as an interpreter would
        traceback.print_exc()
        return False
    return True
