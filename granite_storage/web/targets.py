"""Where a file that arrives is stored, and what becomes of it when its request ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeAlias

from sqlalchemy.orm import InstrumentedAttribute

from granite_storage._engine import require_positive
from granite_storage.manager import StorageManager
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.columns import AttachmentType
from granite_storage.orm.unit_of_work import StoredObject
from granite_storage.orm.uploads import discard, remove
from granite_storage.refs import StoredObjectRef
from granite_storage.streams import BytesLike

__all__ = ["FileList", "FileTarget", "Incoming", "PolicyTarget", "Received", "Target", "max_size_of", "require_target"]


class Incoming(Protocol):
    """A file on its way in: its name and media type, and its bytes by `async for`."""

    filename: str | None
    content_type: str | None

    def __aiter__(self) -> AsyncIterator[BytesLike]: ...


@dataclass(frozen=True, kw_only=True)
class PolicyTarget:
    """Stores a file under a policy of a manager, and gives its ref: for applications that look after refs themselves.

    Args:
        manager: The manager.
        storage_key: The policy to store it under.
        model_name: What kind of thing owns it; a segment of its location, like the next two.
        entity_id: Which of them.
        field_name: Which of its files.
        extra: Keys of your own to keep in the ref.
    """

    manager: StorageManager
    storage_key: str
    model_name: str
    entity_id: str
    field_name: str
    extra: Mapping[str, Any] | None = None

    async def put(self, file: Incoming) -> StoredObjectRef:
        """Store a file as it arrives; see `StorageManager.put_stream`."""
        return await self.manager.put_stream(
            storage_key=self.storage_key,
            model_name=self.model_name,
            entity_id=self.entity_id,
            field_name=self.field_name,
            stream=file,
            content_type=file.content_type,
            original_filename=file.filename,
            extra=self.extra,
        )


Target: TypeAlias = InstrumentedAttribute[Any] | PolicyTarget | Callable[[Any], Awaitable[Any]]
"""An attachment attribute, such as `Document.file`; a `PolicyTarget`; or a coroutine function that takes a `FilePart`."""


@dataclass(frozen=True)
class FileList:
    """Takes several files of one field, such as `<input type="file" multiple>` sends; without it a field takes one file.

    Args:
        target: Where each of them is stored.
        max_files: The most files of the field.

    Raises:
        ConfigurationError: `max_files` is not a positive number.
    """

    target: Target
    max_files: int

    def __post_init__(self) -> None:
        require_target(self.target)
        require_positive("max_files", self.max_files)


FileTarget: TypeAlias = Target | FileList
"""Where the files of a field are stored: a target for one file, or a `FileList`."""


def require_target(target: object) -> None:
    """Refuse what nothing can be stored in, before a body is read."""
    if isinstance(target, PolicyTarget) or _home_of(target) is not None or (callable(target) and not isinstance(target, type)):
        return
    raise TypeError(f"a file is stored in an attachment attribute, a PolicyTarget or a coroutine function, not in {target!r}")


def max_size_of(target: Target) -> int | None:
    """Return the most bytes that the policy of a target allows, None for no limit, or none that is known."""
    if isinstance(target, PolicyTarget):
        return target.manager.policy(target.storage_key).max_size
    home = _home_of(target)
    return None if home is None else home.binding().manager_for(home).policy(home.storage_key).max_size


def _home_of(target: object) -> AttachmentType | None:
    home = getattr(target, "type", None)
    return home if isinstance(home, AttachmentType) else None


@dataclass(slots=True)
class Received:
    """What one request has stored so far, so that it can be taken back."""

    attachments: list[Attachment] = field(default_factory=list)
    refs: list[StoredObject] = field(default_factory=list)

    @classmethod
    def of(cls, stored: object) -> Self:
        """Remember what was stored already."""
        return cls([stored] if isinstance(stored, Attachment) else [])

    def __bool__(self) -> bool:
        return bool(self.attachments or self.refs)

    async def store(self, file: Incoming, target: Target) -> Any:
        """Store a file where it shall go, as it arrives."""
        if isinstance(target, PolicyTarget):
            ref = await target.put(file)
            self.refs.append(StoredObject(target.manager, ref))
            return ref
        if isinstance(target, InstrumentedAttribute):
            pending = Attachment(file, filename=file.filename, content_type=file.content_type)
            stored: Any = await pending.store(target)
        else:
            stored = await target(file)
        if isinstance(stored, Attachment):
            self.attachments.append(stored)
        return stored

    async def take_back(self, *, cancelled: bool) -> None:
        """Remove everything, for nobody has seen it; what could not be removed is logged."""
        refs, self.refs = self.refs, []
        await self.discard_attachments(cancelled=cancelled)
        await remove(refs, [])

    async def discard_attachments(self, *, cancelled: bool = False, but_assigned: bool = False) -> None:
        """Remove the attachments that no row has taken.

        Args:
            cancelled: Whether the task is being cancelled; a journal then removes what it knows of.
            but_assigned: Whether those stay that an instance holds: a flush that is yet to come may store its row.
        """
        attachments, self.attachments = self.attachments, []
        await discard(
            [attachment for attachment in attachments if not (but_assigned and attachment._is_assigned)], cancelled=cancelled
        )
