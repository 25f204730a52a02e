"""Errors as problem details."""

from __future__ import annotations

import json
import pickle
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from granite_storage import StorageError, exceptions
from granite_storage.web import (
    MalformedRequestError,
    RequestTooLargeError,
    UnsupportedRequestError,
    install_error_handlers,
    problem_response,
)

SECRETS = {"backend": "secret-backend", "location": "secret/location"}
MESSAGE = "SELECT secret FROM /srv/secret"

ERRORS: list[tuple[StorageError, int]] = [
    (exceptions.ContentTooLargeError(MESSAGE, max_size=5), 413),
    (exceptions.CollectionFullError(MESSAGE, max_files=5), 413),
    (exceptions.CollectionFullError(MESSAGE, max_total_size=5), 413),
    (exceptions.ObjectNotFoundError(MESSAGE, **SECRETS), 404),
    (exceptions.ObjectExistsError(MESSAGE, **SECRETS), 409),
    (exceptions.StaleAttachmentError(MESSAGE), 409),
    (exceptions.BackendUnavailableError(MESSAGE, **SECRETS), 503),
    (exceptions.StorageFullError(MESSAGE, **SECRETS), 507),
    (exceptions.DerivationFailedError(MESSAGE), 503),
    (exceptions.DerivationRefusedError("the image is damaged"), 422),
    (exceptions.AccessDeniedError(MESSAGE, **SECRETS), 500),
    (exceptions.BackendError(MESSAGE, **SECRETS), 500),
    (exceptions.ChecksumMismatchError(MESSAGE, expected="secret", actual="secret"), 500),
    (exceptions.SizeMismatchError(MESSAGE), 500),
    (exceptions.InvalidLocationError(MESSAGE), 500),
    (exceptions.InvalidReferenceError(MESSAGE), 500),
    (exceptions.UnknownPolicyError(MESSAGE), 500),
    (exceptions.ConfigurationError(MESSAGE), 500),
    (exceptions.UnboundAttachmentError(MESSAGE), 500),
    (exceptions.ConsumedSourceError(MESSAGE), 500),
    (RequestTooLargeError("there are too many files", limit="max_files", maximum=3), 413),
    (MalformedRequestError("the form is cut off"), 400),
    (UnsupportedRequestError("the body has a Content-Encoding"), 415),
]


@pytest.mark.parametrize(("error", "status"), ERRORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("kind", [Starlette, FastAPI])
async def test_an_error_becomes_a_response(
    error: StorageError, status: int, kind: type[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: Request) -> Response:
        raise error

    app = kind(routes=[Route("/", fail)])
    install_error_handlers(app, retry_after=7)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        response = await client.get("/")
    body = response.json()
    assert (response.status_code, body["status"]) == (status, status)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers.get("retry-after") == ("7" if status == 503 else None)
    assert (body["type"], bool(body["title"]), bool(body["detail"])) == ("about:blank", True, True)
    assert "secret" not in response.text
    assert error.docs is None or error.docs not in response.text
    assert [record.exc_info is not None for record in caplog.records] == ([True] if status >= 500 else [])


def test_limits_are_told() -> None:
    response = problem_response(RequestTooLargeError("there are too many files", limit="max_files", maximum=3))
    assert json.loads(bytes(response.body)) == {
        "type": "about:blank",
        "title": "Content Too Large",
        "status": 413,
        "detail": "There are too many files.",
        "limit": "max_files",
        "maximum": 3,
    }


@pytest.mark.parametrize("error", [error for error, _ in ERRORS], ids=lambda error: type(error).__name__)
def test_errors_pickle(error: StorageError) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(copy), str(copy), copy.__dict__) == (type(error), str(error), error.__dict__)


async def test_a_client_that_went_away_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(_: Request) -> Response:
        raise ClientDisconnect

    app = Starlette(routes=[Route("/", fail)])
    install_error_handlers(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        assert (await client.get("/")).content == b""
    assert caplog.records == []
