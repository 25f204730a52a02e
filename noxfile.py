"""The project's chores by name: `python -m nox -s tests`, and `python -m nox --list` for the others.

What follows `--` goes to the program that the session runs: `nox -s tests -- -k local -x`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2024.4.15"
signal.signal(signal.SIGTERM, signal.default_int_handler)  # a session that is ended so ends its program, as after Ctrl-C
nox.options.sessions = ["lint", "types", "layers", "docs", "tests"]

PARALLEL = (f"--numprocesses={min(os.cpu_count() or 1, 4) + 2}", "--dist=worksteal")
"""Two processes more than the machine has processors, since many tests wait; each starts the servers that its tests need."""

STOPPING = {"interrupt_timeout": 2.0, "terminate_timeout": 60.0}
"""How long a run that is ended may take, in seconds, until it is sent SIGTERM and until it is killed: it has servers to stop."""

CONSTRAINTS = Path(".ci/constraints.txt")
"""The versions that CI installs: `PIP_CONSTRAINT` names it there."""

DIST = Path("dist")
"""Where the distributions go that a release uploads."""

SUPPORTED = ("3.11", "3.12", "3.13")


def version_of(program: str) -> str | None:
    """Return the version of an interpreter that really starts: a version manager's stand-in may only print an error."""
    try:
        command = [program, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def present(version: str) -> bool:
    """Tell whether an interpreter of this version is on the path and starts."""
    program = shutil.which(f"python{version}")
    return program is not None and version_of(program) == version


RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHONS = [RUNNING, *(version for version in SUPPORTED if version != RUNNING and present(version))]


@nox.session(python=RUNNING)
def demo(session: nox.Session) -> None:
    """Store, stream, verify, copy and delete real files: the ones given after `--`, or some of the project's own."""
    session.install(".[demo]")
    session.run("python", "examples/quickstart.py", *session.posargs)


@nox.session(python=RUNNING)
def gallery(session: nox.Session) -> None:
    """Serve the example gallery on http://127.0.0.1:8000; `-- --port 8080 --folder ./gallery` chooses otherwise."""
    session.install(".[gallery]")
    session.run("python", "-m", "examples.gallery", *session.posargs)


@nox.session(python=RUNNING)
def tests(session: nox.Session) -> None:
    """Run the default tier of the tests, against real disks and real servers; `-- PATH -k NAME` chooses."""
    run_tests(session)


@nox.session(python=PYTHONS)
def exhaustive(session: nox.Session) -> None:
    """Run every test there is, with random seeds and long histories, on every Python that is present."""
    run_tests(session, "--exhaustive")


def run_tests(session: nox.Session, *options: str) -> None:
    """Run tests in parallel processes, and afterwards alone those that have time bounds."""
    session.install("-e", ".[alembic,cli,demo,obstore,s3,test]", "nox")  # a test ends a run of nox
    # To compile all tests in each process takes longer than any of them.
    session.env["PYTHONDONTWRITEBYTECODE"] = ""
    if session.posargs:
        session.run("python", "-m", "pytest", *options, *session.posargs, **STOPPING)
        return
    failed = False
    for chosen in (["-m", "not time_bound", *PARALLEL], ["-m", "time_bound"]):
        try:
            session.run("python", "-m", "pytest", *options, *chosen, **STOPPING)
        except CommandFailed:
            failed = True
    if failed:
        session.error("tests failed")


@nox.session(python=RUNNING)
def mutants(session: nox.Session) -> None:
    """Break the library in one rule at a time, and check that the tests notice; `-- NAME` chooses a mutant."""
    session.install("-e", ".[alembic,cli,demo,obstore,s3,test]")
    session.run("python", "-m", "tests.mutants", *session.posargs)


@nox.session(python=RUNNING)
def crash(session: nox.Session) -> None:
    """Kill programs at every step of the journal's protocol, 500 times or `GRANITE_CRASH_KILLS`, and check what is left."""
    session.install("-e", ".[alembic,cli,demo,obstore,s3,test]")
    session.env.setdefault("GRANITE_CRASH_KILLS", os.environ.get("GRANITE_CRASH_KILLS", "500"))
    session.run("python", "-m", "pytest", "--exhaustive", *(session.posargs or ["tests/faults/crash"]))


@nox.session(python=RUNNING)
def lint(session: nox.Session) -> None:
    """Check the rules and the format."""
    session.install("ruff>=0.17")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=RUNNING)
def types(session: nox.Session) -> None:
    """Check the types with mypy and pyright, and that every public name has one."""
    session.install(".[dev]")
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--ignoreexternal", "--verifytypes", "granite_storage")


@nox.session(python=RUNNING)
def layers(session: nox.Session) -> None:
    """Check which room imports which."""
    session.install(".[lint]")
    session.run("lint-imports")


@nox.session(python=RUNNING)
def advisories(session: nox.Session) -> None:
    """Ask for published advisories of what CI installs, and of the oldest versions that the package admits."""
    session.install("pip-audit>=2.10", "uv")
    floors = Path(session.create_tmp()) / "floors.txt"
    extras = [
        f"--extra={extra}"
        for extra in (
            "advanced-alchemy",
            "alembic",
            "cli",
            "gallery",
            "images",
            "inspect",
            "litestar",
            "obstore",
            "otel",
            "s3",
            "sqladmin",
            "starlette-admin",
            "vips",
            "web",
        )
    ]
    session.run("uv", "pip", "compile", "-q", "--resolution=lowest-direct", *extras, "pyproject.toml", "-o", str(floors))
    for requirements in (CONSTRAINTS, floors):
        session.run("pip-audit", "--strict", "--disable-pip", "--no-deps", "-r", str(requirements))


@nox.session(python=RUNNING)
def constraints(session: nox.Session) -> None:
    """Bring the versions that CI installs up to date; what that breaks is seen here, and not on the day of another's release."""
    session.install("uv")
    options = ["-q", "--upgrade", "--universal", "--python-version=3.11", "--no-header", "--no-annotate", "--extra=dev"]
    session.run("uv", "pip", "compile", *options, "pyproject.toml", "-o", str(CONSTRAINTS))


@nox.session(python=RUNNING)
def docs(session: nox.Session) -> None:
    """Build the documentation into `docs/_build/html`; a warning is an error."""
    session.install(".[advanced-alchemy,alembic,cli,docs,flask,litestar,obstore,s3,sqladmin,starlette-admin,web]")
    session.run("sphinx-build", "-W", "-n", "--keep-going", "-E", "docs", "docs/_build/html")


@nox.session(python=RUNNING)
def package(session: nox.Session) -> None:
    """Build the source distribution and the wheel into `dist`, and check what is in them."""
    session.install("build", "hatch-fancy-pypi-readme", "hatchling", "twine")
    shutil.rmtree(DIST, ignore_errors=True)
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(DIST))
    session.run("twine", "check", "--strict", *map(str, sorted(DIST.iterdir())))
    session.run("python", ".ci/check_package.py", str(DIST))


@nox.session(python=RUNNING)
def wheel(session: nox.Session) -> None:
    """Use the README's program with the wheel that `package` has built, in an environment with nothing else."""
    wheels = [*DIST.glob("*.whl")]
    if len(wheels) != 1:
        session.error(f"{DIST} must have one wheel, not {len(wheels)}: run python -m nox -s package wheel")
    (line,) = re.findall(r"^pip install (.+ uvicorn)$", Path("README.md").read_text(), re.MULTILINE)
    extras, *others = shlex.split(line)
    session.install(f"{wheels[0].resolve()}{extras.removeprefix('granite-storage')}", *others)
    folder = Path(session.create_tmp()).resolve()
    session.env["PYTHONPATH"] = ""
    program, readme = Path(".ci/use_readme.py").resolve(), Path("README.md").resolve()
    session.chdir(folder)
    session.run("python", "-I", "-u", str(program), str(readme))


@nox.session(python=RUNNING)
def bench(session: nox.Session) -> None:
    """Measure, and print the tables: `-- --only disk` chooses, `-- --json FILE` keeps the numbers."""
    session.install("-e", ".[obstore,s3,test]")
    for path in sorted(Path("tests/benchmarks").glob("bench_*.py")):
        session.run("python", "-m", f"tests.benchmarks.{path.stem}", *session.posargs)
