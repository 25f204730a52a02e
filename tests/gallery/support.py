"""What is on the disk of a gallery."""

from __future__ import annotations

from pathlib import Path

__all__ = ["stored"]


def stored(folder: Path, prefix: str = "gallery") -> dict[str, bytes]:
    """The files that the gallery has stored below a prefix, by the name that a ref's location ends with."""
    found = sorted((folder / "data" / "files" / prefix).rglob("*"))
    return {path.name: path.read_bytes() for path in found if path.is_file()}
