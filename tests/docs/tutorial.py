"""The pages of the tutorial as a program: the files that they create, and the commands that they show.

`python -m tests.docs.tutorial` writes the files of all pages into `examples/team_files`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["EXAMPLE", "PAGES", "Command", "File", "steps_of", "write_files"]

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/team_files"
FOLDER = ROOT / "docs/tutorial"
PAGES = [FOLDER / "index.md", *sorted(FOLDER.glob("[0-9]-*.md"))]
BLOCK = re.compile(r"^```(?P<kind>\{code-block\}|console)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r":caption: (?P<name>\S+)(?: \((?P<how>[\w ]+)\))?\n(?::[^\n]*\n)*\n(?P<text>.*)", re.DOTALL)


@dataclass(frozen=True)
class File:
    """A file that a page creates or changes.

    Attributes:
        name: Its path in the folder of the application.
        how: "appended" or "first line", for what changes the file of an earlier page; None for a whole file.
        text: The lines of the block.
    """

    name: str
    how: str | None
    text: str

    def write(self, folder: Path) -> None:
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text() if self.how else ""
        if self.how == "appended":
            path.write_text(f"{before}\n\n{self.text}")
        else:
            path.write_text(self.text + before.partition("\n")[2])


@dataclass(frozen=True)
class Command:
    """A command of a page, without the prompt, and the output that the page shows."""

    text: str
    output: str


def steps_of(page: Path) -> Iterator[File | Command]:
    """Return the files and the commands of a page in their order."""
    for block in BLOCK.finditer(page.read_text()):
        if block["kind"] == "console":
            for text in re.split(r"^\$ ", block["text"], flags=re.MULTILINE)[1:]:
                command, _, output = re.sub(r"\\\n\s*", "", text).partition("\n")
                yield Command(command, output.strip())
        elif file := FILE.match(block["text"]):
            yield File(file["name"], file["how"], file["text"])


def write_files(folder: Path) -> None:
    """Write the files of all pages into a folder."""
    for page in PAGES:
        for step in steps_of(page):
            if isinstance(step, File):
                step.write(folder)


if __name__ == "__main__":
    write_files(EXAMPLE)
