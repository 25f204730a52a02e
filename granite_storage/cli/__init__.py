"""The command `granite-storage`; `docs/command-line.md` describes it. It needs the extra `cli`."""

from __future__ import annotations

import sys

__all__ = ["main"]

_PACKAGES = ("click", "rich")


def main() -> None:
    """Run the command line, and leave the program with its exit code."""
    try:
        from granite_storage.cli.commands import command_line
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        sys.exit(
            f"granite-storage: the package {package!r} is missing; the command line needs the extra 'cli':"
            ' pip install "granite-storage[cli]"'
        )
    command_line(prog_name="granite-storage")
