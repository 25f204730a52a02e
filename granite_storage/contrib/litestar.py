"""A plugin for Litestar: attachments in responses and in the API's description, errors, the lifespan, and received forms.

The extra `litestar` brings what it needs.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import inspect
from sqlalchemy.orm import Mapper

from granite_storage._problems import RETRY_AFTER
from granite_storage.exceptions import ConfigurationError, MissingDependencyError, StorageError
from granite_storage.manager import StorageManager
from granite_storage.orm.attachment import Attachment, AttachmentVariant, AttachmentVariants
from granite_storage.orm.collections import AttachedFile, AttachmentList
from granite_storage.orm.columns import AttachmentType
from granite_storage.orm.journal.journal import StorageJournal
from granite_storage.refs import StoredObjectRef

try:
    from litestar import Litestar, Request, Response
    from litestar.di import Provide
    from litestar.handlers import HTTPRouteHandler
    from litestar.openapi.spec import OpenAPIType, Operation, Reference, RequestBody, Schema
    from litestar.plugins import InitPlugin, OpenAPISchemaPlugin, ReceiveRoutePlugin
    from litestar.routes import BaseRoute, HTTPRoute
    from litestar.utils.signature import ParsedSignature
    from litestar.utils.typing import instantiable_type_mapping, safe_generic_origin_map
except ImportError as _error:
    raise MissingDependencyError(
        "granite_storage.contrib.litestar needs Litestar: pip install 'granite-storage[litestar]'"
    ) from _error

from starlette import requests

from granite_storage.web import FileTarget, UploadForm, UploadLimits, problem_response, stream_upload, upload_form
from granite_storage.web._openapi import only_body

if TYPE_CHECKING:
    from litestar._openapi.schema_generation import SchemaCreator
    from litestar.config.app import AppConfig
    from litestar.typing import FieldDefinition

__all__ = ["StoragePlugin", "provide_upload_form"]

_ENCODERS: Mapping[Any, Any] = {
    Attachment: Attachment.describe,
    AttachmentVariant: AttachmentVariant.describe,
    AttachmentVariants: dict,
    StoredObjectRef: StoredObjectRef.to_dict,
    AttachedFile: AttachedFile.describe,
}


class _CollectionType:
    """Gives a DTO the type of a collection, whose annotation does not name the type of its elements."""

    def __getitem__(self, _: Any) -> type[AttachmentList]:
        return AttachmentList  # as which no request can be decoded, not even an empty list, which would delete all files


safe_generic_origin_map[AttachmentList] = _CollectionType()
instantiable_type_mapping[AttachmentList] = list


class StoragePlugin(InitPlugin, OpenAPISchemaPlugin, ReceiveRoutePlugin):
    """Adds support for attachments to a Litestar application: `Litestar(..., plugins=[StoragePlugin(storage)])`.

    - Handlers return rows, attachments, their variants and collections, through `SQLAlchemyDTO`, the serialization plugin or in a
      dict; they are shown by size, media type, name and checksum, and so the OpenAPI document describes them. They are read-only
      for DTOs: no body of a request can supply, clear or omit one.
    - The OpenAPI document describes the forms that `provide_upload_form` receives.
    - A handler that returns rows with attachments as nothing can encode them is refused when it is registered.
    - Errors of the library are answered as `install_error_handlers` does, with problem details.
    - The manager is closed with the application, after the journal's worker, where one is to run.
    - Handlers get the manager by a parameter `storage: NamedDependency[StorageManager]`.

    What the application has configured itself has precedence.

    Args:
        storage: The manager.
        journal: The journal whose worker runs with the application; None for none, such as where a process of its own runs it.
        dependency: The name of the parameter by which handlers get the manager.
        retry_after: The Retry-After of an unavailable storage, in seconds.

    Raises:
        ConfigurationError: `storage` is no manager. The application raises it for a handler whose annotation names a model with
            attachments, and that has neither a `return_dto` nor a plugin, an encoder or a response for the model; and for one
            that receives several forms.

    Example:
        ```python
        app = Litestar([create, show], plugins=[StoragePlugin(storage, journal=journal)])
        ```
    """

    def __init__(
        self,
        storage: StorageManager,
        *,
        journal: StorageJournal | None = None,
        dependency: str = "storage",
        retry_after: int = RETRY_AFTER,
    ) -> None:
        if not isinstance(storage, StorageManager):
            raise ConfigurationError(f"StoragePlugin needs a StorageManager, not {type(storage).__name__}")
        self._storage = storage
        self._journal = journal
        self._dependency = dependency
        self._retry_after = retry_after

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Configure the application; Litestar calls it."""
        app_config.type_encoders = {**_ENCODERS, **(app_config.type_encoders or {})}
        app_config.exception_handlers = {
            StorageError: self._answer,
            requests.ClientDisconnect: lambda *_: Response(b"", status_code=400),
            **app_config.exception_handlers,
        }
        provided = Provide(lambda: self._storage, sync_to_thread=False)
        app_config.dependencies = {self._dependency: provided, **app_config.dependencies}
        app_config.signature_types = [StorageManager, UploadForm, *app_config.signature_types]
        app_config.lifespan = [self._run, *app_config.lifespan]
        return app_config

    def receive_route(self, route: BaseRoute) -> None:
        """Describe what the handlers of a route receive, and refuse those whose rows cannot be shown; Litestar calls it."""
        for handler in route.route_handlers if isinstance(route, HTTPRoute) else ():
            _require_encodable(handler)
            body = only_body(_bodies_of(handler.parsed_fn_signature, handler.resolve_dependencies()), handler.handler_name)
            if body is not None:
                handler.operation_class = _describing(handler.operation_class, body)

    @staticmethod
    def is_plugin_supported_type(value: Any) -> bool:
        """Tell whether the API's description of a type comes from here; Litestar calls it."""
        return isinstance(value, type) and issubclass(value, Attachment | AttachmentVariant | AttachedFile | AttachmentList)

    def to_openapi_schema(self, field_definition: FieldDefinition, schema_creator: SchemaCreator) -> Schema:
        """Return what a response shows of an attachment; Litestar calls it."""

        def fields(**properties: Schema | Reference) -> Schema:
            return Schema(type=OpenAPIType.OBJECT, properties=properties, required=list(properties))

        text, nothing, whole = (Schema(type=kind) for kind in (OpenAPIType.STRING, OpenAPIType.NULL, OpenAPIType.INTEGER))
        optional, size = Schema(one_of=[text, nothing]), Schema(type=OpenAPIType.INTEGER, minimum=0)
        shown = fields(size=size, content_type=optional, original_filename=optional, checksum=text)
        if field_definition.is_subclass_of((AttachedFile, AttachmentList)):
            shown = fields(id=whole, caption=optional, file=shown)
        if field_definition.is_subclass_of(AttachmentList):
            shown = Schema(type=OpenAPIType.ARRAY, items=shown)
        return Schema(one_of=[shown, nothing]) if field_definition.is_optional else shown

    @asynccontextmanager
    async def _run(self, _: Litestar) -> AsyncGenerator[None, None]:
        async with self._storage, nullcontext() if self._journal is None else self._journal.worker():
            yield

    def _answer(self, _: Request[Any, Any, Any], error: StorageError) -> Response[bytes]:
        problem = problem_response(error, retry_after=self._retry_after)
        headers = {name: value for name, value in problem.headers.items() if name not in ("content-length", "content-type")}
        return Response(bytes(problem.body), status_code=problem.status_code, headers=headers, media_type=problem.media_type)


def _require_encodable(handler: HTTPRouteHandler) -> None:
    def is_bare(kind: Any) -> bool:
        mapper: object = inspect(kind, raiseerr=False) if isinstance(kind, type) else None
        if not isinstance(mapper, Mapper) or is_dataclass(kind) or any(base in encoders for base in kind.__mro__):
            return False
        return any(isinstance(getattr(attribute, "type", None), AttachmentType) for attribute in mapper.all_orm_descriptors)

    encoders = handler.resolve_type_encoders()
    returned = handler.parsed_return_field
    is_plain = handler.resolve_return_dto() is None and handler.resolve_response_class() is Response
    if returned.is_subclass_of(Response) or not is_plain:
        return  # a response may have encoders of its own
    if returned.match_predicate_recursively(lambda field: is_bare(field.annotation)):
        raise ConfigurationError(
            f"Litestar cannot encode the rows that {handler.handler_name!r} returns, {returned.raw}: give it a"
            " return_dto=SQLAlchemyDTO[...], or the application the SQLAlchemySerializationPlugin, both of advanced-alchemy"
        )


class _FormProvider(Provide):
    """A dependency that receives a form, with the description of the form."""

    body: RequestBody


def _bodies_of(signature: ParsedSignature, dependencies: Mapping[str, Provide]) -> Iterator[RequestBody]:
    """Yield the descriptions of the forms that a handler receives by its dependencies, or these by theirs."""
    for provider in (dependencies[name] for name in signature.parameters if name in dependencies):
        if isinstance(provider, _FormProvider):
            yield provider.body
        yield from _bodies_of(provider.parsed_fn_signature, dependencies)


def _describing(operation_class: type[Operation], body: RequestBody) -> type[Operation]:
    def describe(**values: Any) -> Operation:
        operation = operation_class(**values)
        operation.request_body = operation.request_body or body  # the application's own has precedence
        return operation

    return cast("type[Operation]", describe)


def provide_upload_form(
    files: Mapping[str, FileTarget],
    *,
    fields: Collection[str] = (),
    required: Collection[str] = (),
    limits: UploadLimits | None = None,
) -> Provide:
    """Return a dependency that receives a form, which `StoragePlugin` describes in the OpenAPI document.

    The handler has a parameter `form: NamedDependency[UploadForm]`, and none called `data`: Litestar would read the body first.
    When it has ended, the attachments that no row has taken are removed, as by `async with await stream_upload(...)`, whose
    arguments and errors these are.

    Args:
        files: Where the file of each field goes.
        fields: The names of other fields, which the OpenAPI document shows as texts; further ones are received as well.
        required: The names of the files and of the other fields that the form must have.
        limits: The limits of the form; None for the default ones.

    Example:
        ```python
        form = provide_upload_form({"file": Document.file})


        @post("/documents", dependencies={"form": form})
        async def create(form: NamedDependency[UploadForm]) -> None: ...
        ```
    """

    async def provide(request: Request[Any, Any, Any]) -> AsyncGenerator[UploadForm, None]:
        received = requests.Request(request.scope, request.receive)  # type: ignore[arg-type]  # the same, by other types
        async with await stream_upload(received, files, required=required, limits=limits or UploadLimits()) as form:
            yield form

    provider = _FormProvider(provide)
    provider.body = RequestBody(**upload_form(files, fields=fields, required=required).openapi_extra["requestBody"])
    return provider
