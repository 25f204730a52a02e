"""What FastAPI cannot know of a dependency that reads the body itself: its description, and the shape of FastAPI's own errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import wraps
from typing import Any, TypeVar

from starlette.applications import Starlette

from granite_storage.exceptions import ConfigurationError

T = TypeVar("T")


def describe_bodies(app: Starlette) -> None:
    """Let the OpenAPI document of a FastAPI application show the bodies that its dependencies receive.

    The application does not start, and has no document, where several dependencies of an endpoint receive its body.
    """
    generate = getattr(app, "openapi", None)
    if generate is None:
        return
    described: dict[str, Any] | None = None

    @wraps(generate)
    def openapi() -> dict[str, Any]:
        nonlocal described
        schema: dict[str, Any] = generate()
        if schema is not described:  # FastAPI generates it once for each state of the routes
            _describe(schema, app)
            described = schema
        return schema

    setattr(app, "openapi", openapi)  # noqa: B010  # Starlette has no such attribute
    run = app.router.lifespan_context

    def lifespan(started: Any) -> AbstractAsyncContextManager[Any]:
        for _ in _described_routes(app):
            pass
        return run(started)

    app.router.lifespan_context = lifespan


def _described_routes(app: Starlette) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the routes whose bodies dependencies receive, with the descriptions of the bodies."""
    from fastapi import routing

    # In earlier versions the routes of routers are among those of the application.
    find_routes: Any = getattr(routing, "iter_route_contexts", iter)
    for route in find_routes(app.routes):
        body = only_body(_bodies_of(getattr(route, "dependant", None)), getattr(route, "path_format", None))
        if body is not None:
            yield route, body


def only_body(bodies: Iterable[T], endpoint: object) -> T | None:
    """Return the description of the body that the dependencies of an endpoint receive; None where they receive none.

    Raises:
        ConfigurationError: Several of them receive it, and it can be read once.
    """
    found = list({id(body): body for body in bodies}.values())
    if len(found) > 1:
        raise ConfigurationError(
            f"{len(found)} dependencies of the endpoint {endpoint!r} receive its body, which can be read once: give it one form"
            " with all files"
        )
    return found[0] if found else None


def _describe(schema: dict[str, Any], app: Starlette) -> None:
    from fastapi.openapi.utils import validation_error_definition, validation_error_response_definition

    for route, body in _described_routes(app):
        operations = schema["paths"].get(getattr(route, "path_format", None), {})
        for operation in (operations.get(method.lower()) for method in (getattr(route, "methods", None) or ())):
            if operation is None or "requestBody" in operation:  # hidden, or described by the application
                continue
            operation["requestBody"] = body
            if not any(status in operation["responses"] for status in ("422", "4XX", "default")):
                reference = {"$ref": "#/components/schemas/HTTPValidationError"}
                answer = {"description": "Validation Error", "content": {"application/json": {"schema": reference}}}
                operation["responses"]["422"] = answer
                schemas = schema.setdefault("components", {}).setdefault("schemas", {})
                schemas.setdefault("ValidationError", validation_error_definition)
                schemas.setdefault("HTTPValidationError", validation_error_response_definition)


def _bodies_of(dependant: Any) -> Iterator[dict[str, Any]]:
    """Yield the descriptions of the bodies that a dependency and those that it depends on receive."""
    if dependant is not None:
        extra = getattr(dependant.call, "openapi_extra", None)
        if isinstance(extra, dict) and "requestBody" in extra:
            yield extra["requestBody"]
        for inner in dependant.dependencies:
            yield from _bodies_of(inner)


def missing_error(names: Iterable[str]) -> Exception | None:
    """Return FastAPI's own error for what a form lacks; None without FastAPI, or where the names are unknown."""
    missing = [{"type": "missing", "loc": ("body", name), "msg": "Field required", "input": None} for name in names]
    try:
        from fastapi.exceptions import RequestValidationError
    except ImportError:
        return None
    return RequestValidationError(missing) if missing else None
