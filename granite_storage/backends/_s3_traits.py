"""What is known of a server that does not do all that S3 promises: some ignore a condition or a checksum without a word."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any

__all__ = ["ServerTraits"]

logger = logging.getLogger("granite_storage")


class ServerTraits:
    """What is known of the server behind a backend.

    Args:
        bucket: The bucket's name, for the log.
        conditional_writes: What the backend was told; None to find it out.

    Attributes:
        bucket: The bucket's name.
        sends_conditions: Whether writes have a condition.
        checks_completions: Whether the server looks at the condition of a CompleteMultipartUpload; None while that is not known.
        asking: Whether that is being found out.
        warned_of_end: The end of the temporary credentials of which the log has warned last.
    """

    def __init__(self, bucket: str, conditional_writes: bool | None) -> None:
        self.bucket = bucket
        self.sends_conditions: bool = conditional_writes is not False
        self.checks_completions: bool | None = conditional_writes
        self.asking = False
        self.warned_of_end: datetime | None = None
        self._confirms_checksums = True

    def note_checksum(self, answer: Mapping[str, Any]) -> None:
        """Say so once where an answer to a write does not confirm the SHA-256 that was sent."""
        if self._confirms_checksums and not answer.get("ChecksumSHA256"):
            self._confirms_checksums = False
            logger.warning(
                "the S3 server of bucket %r does not confirm the SHA-256 of what is written, and may not have verified it: with "
                "checksums=False it is sent Content-MD5, which older servers verify; the checksum in each ref is not affected",
                self.bucket,
            )
