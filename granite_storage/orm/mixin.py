"""A thin convenience over an attachment attribute, for models that have one main file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sqlalchemy.ext.asyncio import async_object_session
from sqlalchemy.util import greenlet_spawn

from granite_storage.exceptions import ConfigurationError, ObjectNotFoundError
from granite_storage.orm.attachment import Attachment, UploadFile
from granite_storage.readers import OpeningReader, StoredObjectReader
from granite_storage.refs import StoredObjectRef
from granite_storage.streams import BytesLike, ByteSource


class StoredContentMixin:
    """Gives a model methods for the file in one of its attachment columns.

    They do what assigning an `Attachment` does, on the same unit of work: the flush stores, the commit keeps, a rollback undoes.

    Attributes:
        __stored_content_field_name__: The name of the attachment attribute.

    Example:
        ```python
        class Report(StoredContentMixin, Base):
            __tablename__ = "report"
            __stored_content_field_name__ = "pdf"
            id: Mapped[int] = mapped_column(primary_key=True)
            pdf: Mapped[Attachment | None] = attachment("reports")
        ```
    """

    __stored_content_field_name__: ClassVar[str]

    def set_content(
        self,
        content: BytesLike,
        *,
        filename: str | None = None,
        content_type: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Attachment:
        """Assign bytes as the content; the next flush stores them. Returns the pending attachment."""
        return self._assign(Attachment(content, filename=filename, content_type=content_type, extra=extra))

    def set_content_from_stream(
        self,
        stream: ByteSource,
        *,
        filename: str | None = None,
        content_type: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Attachment:
        """Assign a stream as the content; the next flush reads it, once, and never closes it. Returns the pending attachment."""
        return self._assign(Attachment(stream, filename=filename, content_type=content_type, extra=extra))

    def set_content_from_uploadfile(self, upload: UploadFile, *, extra: Mapping[str, Any] | None = None) -> Attachment:
        """Assign an uploaded file, with its name and media type; the next flush reads it. Returns the pending attachment."""
        return self._assign(Attachment.from_upload(upload, extra=extra))

    async def replace_content(
        self,
        content: ByteSource,
        *,
        filename: str | None = None,
        content_type: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> tuple[StoredObjectRef | None, StoredObjectRef]:
        """Assign content and flush the session: it is stored when the call returns, and the commit removes the previous object.

        Where the instance is in no session, the content is stored for the row that it will become.

        Returns:
            The previous ref, None if there was none, and the new one.

        Raises:
            StorageError: As `StorageManager.put_stream`; the flush has failed, and the transaction is to be rolled back.
        """
        current = await self._current()
        new = self._assign(Attachment(content, filename=filename, content_type=content_type, extra=extra))
        session = async_object_session(self)
        if session is not None:
            await session.flush()
        else:
            await new.store(getattr(type(self), self._content_field()))
        return None if current is None else current._state.ref, new.ref

    async def get_content(self) -> bytes:
        """Return all bytes of the content, verified; see `Attachment.read`.

        Raises:
            ObjectNotFoundError: There is no content.
        """
        return await (await self._required()).read()

    async def get_content_text(self, encoding: str = "utf-8") -> str:
        """Return the content as text; raises as `get_content`, and `UnicodeDecodeError` where it is not in that encoding."""
        return (await self.get_content()).decode(encoding)

    def open_content(self, *, offset: int = 0, length: int | None = None, verify: bool = False) -> OpeningReader:
        """Open the content for streaming: `async with` or `await`; see `Attachment.open`.

        Raises:
            ObjectNotFoundError: There is no content.
        """

        async def start() -> StoredObjectReader:
            return await (await self._required()).open(offset=offset, length=length, verify=verify)

        return OpeningReader(start)

    async def delete_content(self) -> bool:
        """Remove the content; the commit deletes its object. Returns whether there was any."""
        current = await self._current()
        self.clear_content_reference()
        return current is not None

    def clear_content_reference(self) -> None:
        """Set the attribute to None, without reading its value.

        The row owned the object, so the commit removes it, unless the attachment is assigned to another row in the same
        transaction.
        """
        setattr(self, self._content_field(), None)

    @classmethod
    def _content_field(cls) -> str:
        try:
            return cls.__stored_content_field_name__
        except AttributeError:
            raise ConfigurationError(f"{cls.__name__} does not set __stored_content_field_name__") from None

    async def _current(self) -> Attachment | None:
        """Return what the attribute holds; it is loaded where it is expired or deferred."""
        content: Attachment | None = await greenlet_spawn(getattr, self, self._content_field())
        return content

    async def _required(self) -> Attachment:
        content = await self._current()
        if content is None:
            raise ObjectNotFoundError(f"this {type(self).__name__} has no content")
        return content

    def _assign(self, content: Attachment) -> Attachment:
        setattr(self, self._content_field(), content)
        return content
