"""The leases of uploads under way: renewed in time, and given up by the uploader before a worker may take them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from uuid import UUID

from granite_storage.backends.base import upload_begun
from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm.journal.intents import Intents

__all__ = ["Lease"]

logger: logging.Logger = logging.getLogger("granite_storage")

_RENEWALS = 3
_SAFE_SHARE = 0.8


class Lease:
    """The lease that the uploads of one flush share.

    Its end is judged twice: by the database's clock, for the worker, and before that by this machine's monotonic one, for the
    uploader, who then sends nothing more. Neither makes anything safe; they only keep garbage from being made.

    Args:
        intents: What renews it.
        ids: The intents of the uploads.
        duration: How long it is, from each renewal.
        begun: When it was asked for, by the monotonic clock: before the database began to count.
    """

    def __init__(self, intents: Intents, ids: Sequence[UUID], duration: timedelta, begun: float) -> None:
        self._intents = intents
        self._ids = ids
        self._duration = duration
        self._begun = begun

    @property
    def ids(self) -> Sequence[UUID]:
        """The intents, in the order of the uploads."""
        return self._ids

    def begin(self, intent_id: UUID) -> None:
        """Let the running task begin an upload, and keep the id of an upload in parts with its intent.

        Raises:
            StaleAttachmentError: The lease is over for the uploader.
        """
        self.require()
        upload_begun.set(partial(self._intents.note_upload_id, intent_id))

    def require(self) -> None:
        """Raise `StaleAttachmentError` where the lease is over for the uploader: a worker may have been there."""
        if self._remaining() <= 0:
            raise _expired()

    async def hold(self) -> None:
        """Renew it until cancelled; raise `StaleAttachmentError` where that fails for too long."""
        while True:
            await asyncio.sleep(min(self._duration.total_seconds() / _RENEWALS, max(self._remaining() / 2, 0)))
            self.require()
            await self._renew()

    async def _renew(self) -> None:
        asked = time.monotonic()
        try:
            async with asyncio.timeout(self._remaining()):
                there = await self._intents.renew(self._ids, self._duration)
        except Exception as error:  # noqa: BLE001  # whatever keeps it from being renewed, there is time to try again
            logger.warning("the lease of an upload could not be renewed and is tried again: %s", error)
            return
        if not there:
            raise _expired()
        self._begun = asked

    def _remaining(self) -> float:
        return self._begun + self._duration.total_seconds() * _SAFE_SHARE - time.monotonic()


def _expired() -> StaleAttachmentError:
    return StaleAttachmentError("an upload's lease is over before the upload was; the transaction may be tried again")
