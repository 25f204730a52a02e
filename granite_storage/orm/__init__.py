"""Files that commit and roll back with the rows of SQLAlchemy's ORM."""

from granite_storage.orm._interfaces import JournalTables
from granite_storage.orm.attachment import Attachment, AttachmentVariant, AttachmentVariants
from granite_storage.orm.binding import StorageBinding, bind_storage
from granite_storage.orm.collections import (
    AttachedFile,
    AttachmentList,
    append_files,
    attachments,
    count_files,
    file_class,
    sum_sizes,
)
from granite_storage.orm.columns import AttachmentType, StoredObjectRefType, attachment, portable_storage_ref_type
from granite_storage.orm.journal.journal import StorageJournal
from granite_storage.orm.journal.tables import FailedReclaim, RecoveryReport, journal_tables
from granite_storage.orm.journal.triggers import storage_triggers
from granite_storage.orm.mixin import StoredContentMixin
from granite_storage.orm.references import iter_model_storage_refs
from granite_storage.orm.urls import WithURL, sign_urls, sign_urls_sync

__all__ = [
    "AttachedFile",
    "Attachment",
    "AttachmentList",
    "AttachmentType",
    "AttachmentVariant",
    "AttachmentVariants",
    "FailedReclaim",
    "JournalTables",
    "RecoveryReport",
    "StorageBinding",
    "StorageJournal",
    "StoredContentMixin",
    "StoredObjectRefType",
    "WithURL",
    "append_files",
    "attachment",
    "attachments",
    "bind_storage",
    "count_files",
    "file_class",
    "iter_model_storage_refs",
    "journal_tables",
    "portable_storage_ref_type",
    "sign_urls",
    "sign_urls_sync",
    "storage_triggers",
    "sum_sizes",
]
