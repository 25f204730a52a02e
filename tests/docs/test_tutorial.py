"""The tutorial runs page by page, and ends with the application in `examples/team_files`."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import alembic.config
import httpx
import pytest
import uvicorn
import yaml
from blockbuster import BlockBuster
from click.testing import CliRunner
from PIL import Image
from sqlalchemy.engine import URL

from granite_storage._portal import portal
from granite_storage.cli.commands import command_line
from tests.core.support import PROJECT, files_below
from tests.docs.hostile import HOSTILE, require_harmless
from tests.docs.tutorial import EXAMPLE, PAGES, Command, File, steps_of, write_files
from tests.orm.databases import postgres_database
from tests.programs import program
from tests.servers import ACCESS_KEY, SECRET_KEY, S3Server
from tests.services import unavailable

ADDRESS = "http://127.0.0.1:8000"
PREPARATIONS = ("mkdir", "python -m venv", "pip", "createdb")
WRITTEN_BY_ALEMBIC = {"alembic.ini", "migrations/README", "migrations/script.py.mako"}


class Reader:
    """One who follows the tutorial in a folder: runs each command in this process, and the server between two of them."""

    def __init__(self, folder: Path, environment: dict[str, str], test_database: str) -> None:
        self.folder = folder
        self.environment = environment
        self.test_database = test_database
        self.server: contextlib.ExitStack | None = None
        self.address = ""

    def follow(self, page: Path) -> None:
        """Write the files of a page, run its commands, and compare what they print."""
        for step in steps_of(page):
            if isinstance(step, File):
                step.write(self.folder)
            elif not step.text.startswith(PREPARATIONS):
                self.run(step)
        self.close()

    def run(self, command: Command) -> None:
        """Run a command; an output of the page has to be in what it prints."""
        variable = re.fullmatch(r"(\w+)=\$\((.*)\)", command.text)
        text = variable[2] if variable else command.text
        words = shlex.split(text)
        if words[0] == "curl":
            printed = self.curl(text, may_fail=bool(command.output))
        elif words[0] in ("alembic", "granite-storage", "python"):
            self.close()
            with program(self.folder, self.environment):
                sys.path.insert(0, str(self.folder))
                printed = PROGRAMS[words[0]](words[1:])
                portal.close()
        elif words[0].startswith("DATABASE_URL="):
            tests = f"{sys.executable} {shlex.join(words[2:])} -p no:asyncio -p no:cacheprovider"
            printed = self.shell(tests, DATABASE_URL=self.test_database)
        else:
            printed = self.shell(text)
            assert printed or not command.output
            assert command.output or not printed, f"{text} printed {printed}"
        shown = ".*".join(re.escape(part) for part in command.output.split("..."))
        assert re.search(shown, printed, re.DOTALL), f"{text} printed {printed}"
        if variable:
            self.environment[variable[1]] = printed.strip()

    def curl(self, text: str, *, may_fail: bool) -> str:
        if self.server is None:
            self.server = contextlib.ExitStack()
            self.address = self.server.enter_context(serving(self.folder, self.environment))
        return self.shell(text.replace(ADDRESS, self.address) + (" -s" if may_fail else " -sS --fail-with-body"))

    def shell(self, text: str, **environment: str) -> str:
        path = os.pathsep.join([str(PROJECT), str(self.folder)])
        variables = {**self.environment, "PYTHONPATH": path, **environment}
        command = ["bash", "-c", text]
        done = subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, f"{text}: {done.stdout}{done.stderr}"
        return done.stdout

    def close(self) -> None:
        """Stop the server."""
        if self.server is not None:
            self.server.close()
            self.server = None


def run_alembic(arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        alembic.config.main(arguments)
    return printed.getvalue()


def run_command_line(arguments: list[str]) -> str:
    result = CliRunner().invoke(command_line, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def run_python(arguments: list[str]) -> str:
    """Run `python -m MODULE`."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__")
    return printed.getvalue()


PROGRAMS: dict[str, Callable[[list[str]], str]] = {
    "alembic": run_alembic,
    "granite-storage": run_command_line,
    "python": run_python,
}


@contextlib.contextmanager
def serving(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Serve the application of a folder from a thread."""
    with program(folder, environment), socket.socket() as listener:
        sys.path.insert(0, str(folder))
        listener.bind(("127.0.0.1", 0))
        app = importlib.import_module("app.main").app
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets=[listener]),))
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(autouse=True)
def _application_loads(_nothing_blocks: BlockBuster) -> None:
    """The command line imports an application in its event loop, before it does anything else."""
    for function in _nothing_blocks.functions.values():
        function.can_block_in("granite_storage/cli/runtime.py", {"_import_module"})


@pytest.fixture
def databases(postgres_server: URL) -> Iterator[list[str]]:
    """The URLs of two empty databases."""
    with postgres_database(postgres_server, "asyncpg") as one, postgres_database(postgres_server, "asyncpg") as two:
        yield [found.url.render_as_string(hide_password=False) for found in (one, two)]


@pytest.fixture
async def bucket(seaweedfs_server: S3Server) -> AsyncIterator[str]:
    async with seaweedfs_server.bucket() as name:
        yield name


@pytest.fixture
def s3(seaweedfs_server: S3Server, bucket: str) -> dict[str, str]:
    """The variables of page 4, for a real server."""
    return {
        "BUCKET": bucket,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": seaweedfs_server.endpoint_url,
    }


def test_the_pages_run_and_build_the_example(tmp_path: Path, databases: list[str], s3: dict[str, str]) -> None:
    folder = tmp_path / "team_files"
    folder.mkdir()
    Image.new("RGB", (640, 480), "teal").save(folder / "me.png")
    reader = Reader(folder, {**os.environ, "DATABASE_URL": databases[0]}, databases[1])
    with contextlib.closing(reader):
        for page in PAGES:
            if page.name == "4-storage.md":
                reader.environment |= s3
            reader.follow(page)
    written = tmp_path / "written"
    write_files(written)
    built = {name: (written / name).read_text() for name in files_below(written)}
    assert built == {name: (EXAMPLE / name).read_text() for name in built}
    there = {name for name in files_below(EXAMPLE) if "cache" not in name and not name.startswith("migrations/versions/")}
    assert there - set(built) == WRITTEN_BY_ALEMBIC | {"README.md", "pytest.ini", "ruff.toml"}


@pytest.fixture
def example(tmp_path: Path, databases: list[str]) -> Iterator[Any]:
    """The finished application, on the tables that its own migrations create."""
    environment = {**os.environ, "DATABASE_URL": databases[0], "FILES": str(tmp_path / "files")}
    with program(EXAMPLE, environment):
        sys.path.insert(0, str(EXAMPLE))
        run_alembic(["upgrade", "head"])
        run_alembic(["check"])
    with program(EXAMPLE, environment):
        sys.path.insert(0, str(EXAMPLE))
        yield importlib.import_module("app.main")


@pytest.mark.case("RE-08")
async def test_hostile_files_get_harmless_responses(example: Any) -> None:
    database, models = (importlib.import_module(f"app.{name}") for name in ("database", "models"))
    hashed = importlib.import_module("app.users").hash_token("secret")
    headers = {"Authorization": "Bearer secret"}
    transport = httpx.ASGITransport(example.app)
    async with example.app.router.lifespan_context(example.app):
        async with database.sessions.begin() as session:
            session.add(models.User(email="anna@example.org", token_hash=hashed))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            kept = []
            for file in HOSTILE:
                avatar = {"file": (file.name, file.content, file.kind)}
                answer = require_harmless(await client.put("/me/avatar", files=avatar))
                if answer.is_success:
                    require_harmless(await client.get("/users/1/avatar"))
                    require_harmless(await client.get("/users/1/icon"))
                sent = require_harmless(await client.post("/documents", files={"files": (file.name, file.content, file.kind)}))
                if sent.is_success:
                    kept.append(file)
                    url = f"/documents/{sent.json()[0]['id']}"
                    assert require_harmless(await client.get(f"{url}/file")).content == file.content
                    require_harmless(await client.get(f"{url}/thumb"))
            assert kept
            nothing = {"Authorization": "Bearer other"}
            for method, url in (("PUT", "/me/avatar"), ("POST", "/documents"), ("GET", "/documents/1/file")):
                assert (await client.request(method, url, headers=nothing)).status_code == 401
            for number in (-1, 0, 2**31, 2**63, 10**30):
                for url in (f"/documents/{number}/file", f"/documents/{number}/thumb", f"/users/{number}/avatar"):
                    assert (await client.get(url)).status_code == 422
                for url in (f"/documents/{number}", f"/users/{number}"):
                    assert (await client.delete(url)).status_code in (403, 422)


@pytest.mark.exhaustive("page 5 runs the same tests, before the journal")
def test_the_tests_of_the_example_pass_with_its_journal(databases: list[str], tmp_path: Path) -> None:
    reader = Reader(EXAMPLE, {**os.environ, "FILES": str(tmp_path / "files")}, databases[0])
    reader.run(Command("DATABASE_URL=... python -m pytest", "8 passed"))


CONTAINERS = (PROJECT / "docs/containers.md").read_text()


@pytest.mark.parametrize(
    "site",
    [(EXAMPLE / "nginx.conf").read_text(), *re.findall(r"^```nginx\n(.*?)^```", CONTAINERS, re.DOTALL | re.MULTILINE)],
    ids=["tutorial", "containers"],
)
def test_nginx_accepts_its_configuration(tmp_path: Path, site: str) -> None:
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        unavailable("nginx is missing")
    site = site.replace("app:8000", "127.0.0.1:8000").replace("listen 80;", "listen 127.0.0.1:8089;")
    (tmp_path / "site.conf").write_text(site)
    logs = f"error_log stderr; pid {tmp_path}/pid;"
    temporary = " ".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (tmp_path / "nginx.conf").write_text(f"{logs} events {{}} http {{ access_log off; {temporary} include site.conf; }}")
    done = subprocess.run([program, "-t", "-c", tmp_path / "nginx.conf"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_volume_is_the_same_for_the_application_and_nginx() -> None:
    (composed,) = (yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", CONTAINERS, re.DOTALL | re.MULTILINE))
    services = composed["services"]
    assert services["app"]["environment"]["FILES"] == "/files"
    for name, mounted in (("app", "files:/files"), ("volume", "files:/files"), ("nginx", "files:/srv/uploads:ro")):
        assert mounted in services[name]["volumes"]
    assert all(after in services for service in services.values() for after in service.get("depends_on", ()))
    assert "alias /srv/uploads/;" in CONTAINERS


def test_the_containers_get_what_the_application_reads() -> None:
    composed = yaml.safe_load((EXAMPLE / "compose.yaml").read_text())
    services = composed["services"]
    read = set(re.findall(r'environ(?:\.get\()?\[?"(\w+)"', (EXAMPLE / "app/settings.py").read_text()))
    assert read - set(services["app"]["environment"]) == {"FILES"}
    assert services["migrate"]["environment"] == services["collect"]["environment"] == services["app"]["environment"]
    assert {"db", "s3", "nginx"} < set(services)
    commands = [services["collect"]["command"], " ".join(services["app"]["healthcheck"]["test"][1:])]
    for command in commands:
        words = re.search(r"granite-storage ([^;]*)", command)
        assert words is not None
        assert CliRunner().invoke(command_line, [*words[1].split(), "--help"]).exit_code == 0
