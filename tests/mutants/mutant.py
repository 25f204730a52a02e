"""What a mutant is, and how its edit is applied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Mutant", "MutantError", "edit", "problems_of"]


class MutantError(Exception):
    """The table of mutants does not fit the code."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One rule of the library, broken as a careless change would break it.

    Attributes:
        name: What the command line calls it.
        rule: The rule that the edit breaks.
        path: The file to edit, relative to the root of the project.
        old: A text that stands in the file exactly once.
        new: What to put in its place.
        tests: The tests of the default tier that must notice, as pytest takes them. The first ones should be the quickest.
    """

    name: str
    rule: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


def edit(mutant: Mutant, root: Path) -> str:
    """Return the edited text of the file that a mutant changes; the file stays as it is.

    Raises:
        MutantError: The old text does not stand in the file exactly once, or the file is gone.
    """
    try:
        text = (root / mutant.path).read_text()
    except OSError as error:
        raise MutantError(f"{mutant.name}: {mutant.path} cannot be read ({error.strerror}); say where its rule is now") from None
    count = text.count(mutant.old)
    if count != 1:
        raise MutantError(
            f"{mutant.name}: {mutant.path} holds its old text {count} times, not once; rewrite the mutant for the changed"
            f" code, so that it still breaks its rule: {mutant.rule}"
        )
    return text.replace(mutant.old, mutant.new)


def problems_of(mutants: list[Mutant], root: Path) -> list[str]:
    """Return why the edits of some mutants cannot be applied."""
    problems = []
    for mutant in mutants:
        try:
            compile(edit(mutant, root), mutant.path, "exec", dont_inherit=True)
        except MutantError as error:
            problems.append(str(error))
        except SyntaxError as error:
            problems.append(f"{mutant.name}: the edited {mutant.path} is no Python: {error}")
    return problems
