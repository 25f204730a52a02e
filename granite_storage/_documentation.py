"""Where the documentation is, and the pages to which errors lead."""

from __future__ import annotations

from enum import Enum

DOCUMENTATION = "https://granite-storage.readthedocs.io/en/stable/"


class Page(Enum):
    """A page and a heading of the documentation, whose build checks that each exists."""

    ALEMBIC = "migrations.html#journal-tables"
    ATTACHMENTS = "sqlalchemy.html#storing-and-reading"
    AUTOCOMMIT = "sqlalchemy.html#autocommit"
    BINDING = "sqlalchemy.html#binding"
    COLLECTIONS = "collections.html#models"
    COMMAND_LINE = "command-line.html"
    CONCURRENCY = "sqlalchemy.html#concurrent-writers"
    CONNECTIONS = "crash-safety.html#connections-and-poolers"
    DERIVED_FUNCTIONS = "derived.html#functions"
    DIRECT_UPLOADS = "direct-uploads.html#signed-requests-and-tokens"
    EFFECTS = "derived-operations.html#effects"
    EXTRAS = "quickstart.html#extras"
    JOURNAL = "crash-safety.html#setup"
    JOURNAL_ON_SQLITE = "crash-safety.html#sqlite"
    LOCATIONS = "guide.html#keys-prefixes-and-locations"
    MANAGER = "guide.html#configuring-the-manager"
    MODELS = "sqlalchemy.html#models"
    OBSTORE = "obstore.html#errors"
    PUBLIC_FILES = "urls.html#public-files"
    REFS = "guide.html#refs"
    REFUSED_COLLECTIONS = "garbage-collection.html#refusals"
    RENAMED = "crash-safety.html#renamed-tables"
    S3 = "s3.html#checking-the-configuration"
    SCHEMAS = "crash-safety.html#schemas-per-tenant"
    SIGNED_URLS = "serving.html#signed-urls"
    STREAMS = "streams.html#uploads-and-files-already-read"
    THREADS = "synchronous.html#threads-and-waiting"
    TRIGGERS = "guarantees.html#rollout"
    VALIDATORS = "validating.html#custom-rules"
    VARIANTS = "derived.html#timing"

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"{DOCUMENTATION}{self.value}"
