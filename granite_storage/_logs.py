"""What the library logs: which object a record concerns, and errors without the secrets in the words of others.

Every record has the attributes `backend`, `storage_key` and `location`, None where they are unknown. `fields_of` gives them for
`extra=`; otherwise they are those of the error that is logged.

An error of ours quotes no secret, but its cause is the SDK's or the system's own, and that may quote the address that was asked:
with a signature, a token or a password. Log lines show the whole chain, so whatever the library logs passes through here first.
"""

from __future__ import annotations

import copy
import logging
import re

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^\s/\"'<>]*@)?([^\s?\"'<>]*)(\?[^\s\"'<>]*)?", re.IGNORECASE)
_NAMED = re.compile(
    r"""\b((?:[\w-]*(?:signature|token|secret|password|passwd|credential|api[_-]?key|account[_-]?key|access[_-]?key)|sig)["']?\s*[=:]\s*)"""
    r"""("[^"]*"|'[^']*'|(?:Bearer|Basic)\s+\S+|[^\s&,;"'<>)\]}]+)""",
    re.IGNORECASE,
)
_AUTHORIZATION = re.compile(r"(\bauthorization[\"']?\s*[=:]\s*).*", re.IGNORECASE)


FIELDS = ("backend", "storage_key", "location")


def fields_of(subject: object = None, **known: str) -> dict[str, str]:
    """Return what a log record or a span says of the object, the upload, the backend or the collection that it concerns.

    Args:
        subject: A ref, an upload that was prepared, a job, or a report.
        known: The fields themselves, where no such thing has them.
    """
    values = {name: getattr(subject, name, None) for name in FIELDS} | known
    policy = getattr(subject, "policy", None)
    if policy is not None:
        values |= {"backend": policy.backend_key, "storage_key": policy.storage_key}
    return {name: value for name, value in values.items() if isinstance(value, str)}


def redact(text: str) -> str:
    """Return a text without the user, password and query of each address in it, and without what is called a secret."""
    text = _ADDRESS.sub(lambda found: f"{found[1]}{found[2]}{'?...' if found[3] else ''}", text)
    text = _AUTHORIZATION.sub(r"\1...", text)
    return _NAMED.sub(r"\1...", text)


def redact_records() -> None:
    """Have what the library logs pass through `redact`; idempotent."""
    logging.getLogger("granite_storage").addFilter(_REDACTION)


class _Redaction(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        _complete(record)
        message = record.getMessage()
        redacted = redact(message)
        if redacted != message:
            record.msg, record.args = redacted, ()
        if record.exc_info and record.exc_info[1] is not None:
            error = _redacted(record.exc_info[1], {})
            record.exc_info = (type(error), error, record.exc_info[2])
        return True


_REDACTION = _Redaction()


def _complete(record: logging.LogRecord) -> None:
    """Give a record the fields that it lacks: those of the first error that it logs, or None."""
    logged = [record.exc_info[1]] if record.exc_info else []
    logged += [one for one in record.args if isinstance(one, BaseException)] if isinstance(record.args, tuple) else []
    found = fields_of(logged[0] if logged else None)
    for name in FIELDS:
        record.__dict__.setdefault(name, found.get(name))


def _redacted(error: BaseException, done: dict[int, BaseException]) -> BaseException:
    """Return an error as it may be logged: itself where nothing in its chain is to be hidden, else a likeness of it.

    Args:
        error: The error.
        done: What was returned for those of the same chain; one that is not finished yet is hidden as a whole.
    """
    if id(error) in done:
        return done[id(error)]
    done[id(error)] = _likeness(error, "(above)")
    done[id(error)] = _redacted_anew(error, done)
    return done[id(error)]


def _redacted_anew(error: BaseException, done: dict[int, BaseException]) -> BaseException:
    words = str(error)
    cause, context = (one and _redacted(one, done) for one in (error.__cause__, error.__context__))
    notes = [redact(note) for note in getattr(error, "__notes__", ())]
    inner = [_redacted(one, done) for one in error.exceptions] if isinstance(error, BaseExceptionGroup) else []
    same = (
        redact(words) == words
        and cause is error.__cause__
        and context is error.__context__
        and notes == getattr(error, "__notes__", [])
        and (
            not isinstance(error, BaseExceptionGroup)
            or all(one is other for one, other in zip(inner, error.exceptions, strict=True))
        )
    )
    if same:
        return error
    likeness: BaseException
    if isinstance(error, BaseExceptionGroup):
        likeness = error.derive(inner)
    elif redact(words) == words and type(error).__module__.partition(".")[0] == "granite_storage":
        likeness = copy.copy(error)
    else:
        likeness = _likeness(error, redact(words))
    likeness.__cause__, likeness.__context__ = cause, context
    likeness.__suppress_context__ = error.__suppress_context__
    if notes:
        likeness.__notes__ = notes  # a copy shares the list with the error itself
    return likeness.with_traceback(error.__traceback__)


def _likeness(error: BaseException, words: str) -> BaseException:
    """Return an error that is shown as another one, but says other words."""
    kind = type(error)
    shown: type[Exception] = type(kind.__name__, (Exception,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
    return shown(words)
