"""What FastAPI cannot know of a dependency that reads the body itself: its description, and the shape of FastAPI's own errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import wraps
from typing import Any

from starlette.applications import Starlette


def describe_bodies(app: Starlette) -> None:
    """Let the OpenAPI document of a FastAPI application show the bodies that its dependencies receive."""
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


def _describe(schema: dict[str, Any], app: Starlette) -> None:
    from fastapi import routing
    from fastapi.openapi.utils import validation_error_definition, validation_error_response_definition

    # In earlier versions the routes of routers are among those of the application.
    find_routes: Any = getattr(routing, "iter_route_contexts", iter)
    for route in find_routes(app.routes):
        body = next(_bodies_of(getattr(route, "dependant", None)), None)
        operations = schema["paths"].get(getattr(route, "path_format", None), {})
        for operation in (operations.get(method.lower()) for method in (getattr(route, "methods", None) or ()) if body):
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
