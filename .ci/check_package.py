"""Check what is in the distributions: `python .ci/check_package.py dist`, in a clone.

The source distribution has every file of the repository, the wheel every file of the package, and neither anything else. The
README, which PyPI shows, has no link that leads nowhere there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Set
from pathlib import Path

GENERATED = {"PKG-INFO"}


def tracked_files() -> set[str]:
    """Return the files of the repository, or none where git does not know it, such as in a source distribution."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=False)
    return set(filter(None, listed.stdout.split("\0"))) if listed.returncode == 0 else set()


def files_of_sdist(path: Path) -> set[str]:
    with tarfile.open(path) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()} - GENERATED


def files_of_wheel(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def readme_of_wheel(path: Path) -> str:
    """Return what PyPI shows of the project."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(name).decode()


def require_same(what: str, found: Set[str], expected: Set[str]) -> None:
    missing, surplus = sorted(expected - found), sorted(found - expected)
    if missing or surplus:
        sys.exit(f"{what}: missing {missing}, surplus {surplus}")


def main(folder: Path) -> None:
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    source = files_of_sdist(sdist)
    require_same(sdist.name, source, tracked_files() or source)
    in_wheel = files_of_wheel(wheel)
    require_same(wheel.name, in_wheel, {name for name in source if name.startswith("granite_storage/")})
    if "granite_storage/py.typed" not in in_wheel:
        sys.exit(f"{wheel.name} has no py.typed")
    if relative := re.findall(r"\]\((?!https?://|#)[^)]*\)", readme_of_wheel(wheel)):
        sys.exit(f"links of the README that lead nowhere on PyPI: {relative}")
    print(f"{sdist.name} has {len(source)} files, {wheel.name} {len(in_wheel)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
