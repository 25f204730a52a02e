"""How an attachment that was pickled finds its column, and so its manager, in another process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from granite_storage.exceptions import UnboundAttachmentError
from granite_storage.orm._registry import active_bindings

if TYPE_CHECKING:
    from granite_storage.orm.types import AttachmentType

__all__ = ["Address"]


@dataclass(frozen=True, slots=True)
class Address:
    """Says in a pickle which column an attachment belongs to."""

    base: str
    table: str
    column: str
    storage_key: str

    def find(self) -> AttachmentType:
        """Return the type of the column, in the base that has it.

        Raises:
            UnboundAttachmentError: No base with that column is bound here, or more than one.
        """
        found = [binding for binding in active_bindings() if self._fits(binding.column_type(self.table, self.column))]
        named = [binding for binding in found if binding.base_name == self.base]
        for candidates in (named, found):
            if len(candidates) == 1:
                return candidates[0].attachment_type(self.table, self.column)
        raise UnboundAttachmentError(
            f"an attachment of {self.table}.{self.column} was unpickled, and {'no' if not found else 'more than one'}"
            f" base with that column is bound here"
        )

    def _fits(self, home: AttachmentType | None) -> bool:
        return home is not None and home.storage_key == self.storage_key
