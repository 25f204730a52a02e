"""What a response model shows of an attachment: size, media type, name and checksum, never where the bytes lie."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from granite_storage.exceptions import UnboundAttachmentError

if TYPE_CHECKING:
    from pydantic_core import CoreSchema, SchemaSerializer

    from granite_storage.orm.attachment import Attachment

__all__ = ["LazySerializer", "core_schema_of", "fields_schema"]

logger: logging.Logger = logging.getLogger("granite_storage")


def core_schema_of(attachment: type[Attachment]) -> CoreSchema:
    """Return how pydantic checks and shows attachments.

    In Python they stay what they are, so that `Model(**schema.model_dump())` assigns them; in JSON they are shown. One whose row
    holds no ref that can be read is shown as null and logged: one bad row must not take down a list. The JSON schema offers no
    null for it, for a client need not reckon with a damaged database.
    """
    from pydantic_core import core_schema

    shown = core_schema.nullable_schema(fields_schema())
    serialization = core_schema.plain_serializer_function_ser_schema(_fields, return_schema=shown, when_used="json")
    return core_schema.is_instance_schema(attachment, serialization=serialization)


class LazySerializer:
    """Lets pydantic show an attachment where no field says that there is one, as in an endpoint that returns a plain dict."""

    def __get__(self, instance: object, owner: type[Attachment]) -> SchemaSerializer:
        try:
            from pydantic_core import SchemaSerializer
        except ImportError:
            raise AttributeError("__pydantic_serializer__") from None
        serializer = SchemaSerializer(core_schema_of(owner))
        owner.__pydantic_serializer__ = serializer
        return serializer


def fields_schema() -> CoreSchema:
    """Return the schema of what is shown."""
    from pydantic_core import core_schema

    text, field = core_schema.str_schema(), core_schema.typed_dict_field
    optional = core_schema.nullable_schema(text)
    return core_schema.typed_dict_schema(
        {
            "size": field(core_schema.int_schema(ge=0)),
            "content_type": field(optional),
            "original_filename": field(optional),
            "checksum": field(text),
        }
    )


def _fields(value: Attachment) -> dict[str, Any] | None:
    if value._error is not None:
        logger.warning("an attachment is shown as null, because its row holds no ref that can be read: %s", value._error)
        return None
    if value.is_pending:
        raise UnboundAttachmentError("the attachment is not stored yet; flush the session before it is shown")
    return value.describe()
