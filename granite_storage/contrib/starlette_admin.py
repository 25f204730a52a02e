"""Attachments in starlette-admin: forms that keep, replace or clear a file, previews, and files for the panel's users only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from markupsafe import Markup
from sqlalchemy import Column
from sqlalchemy.orm import InstrumentedAttribute
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette_admin.base import BaseAdmin
from starlette_admin.contrib.sqla.converters import register_converter
from starlette_admin.fields import FileField
from starlette_admin.plugins import BasePlugin
from starlette_admin.storage import BaseStorage, FileInfo
from starlette_admin.types import RequestAction

from granite_storage.contrib._panels import (
    FileAction,
    FileChange,
    FileView,
    discarded_unless_assigned,
    render_file,
    render_input,
    serve,
    store,
)
from granite_storage.exceptions import ConfigurationError
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.columns import AttachmentType

__all__ = ["AttachmentField", "AttachmentPlugin"]

_STORED = "granite_storage.stored"
_VIEWS = "granite_storage.views"


@dataclass(frozen=True, eq=False)
class _File(FileInfo):
    """An attachment as starlette-admin takes a stored file: `to_dict` returns what the attribute of the row is set to."""

    attachment: Attachment | None = None
    row: Any = None

    @classmethod
    def of(cls, attachment: Attachment, row: Any = None) -> Self:
        fields = attachment.describe()
        name, content_type, size = fields["original_filename"] or "file", fields["content_type"] or "", fields["size"] or 0
        return cls(name, content_type, size, _Storage.name, "", attachment=attachment, row=row)

    def to_dict(self) -> Any:
        return self.attachment


class _Storage(BaseStorage):
    """Passes on what `AttachmentField` has stored already: starlette-admin keeps the present file of a field with a storage."""

    name = "granite-storage"

    async def save(self, upload: UploadFile, dest: str) -> Any:
        return upload

    async def url(self, request: Request, key: str, *, signed: bool = False, expires: int = 3600) -> str:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        raise NotImplementedError


@dataclass(init=False)
class AttachmentField(FileField):
    """An attachment of a model, for the `fields` of a view; `AttachmentPlugin` makes one for each that is named there.

    Args:
        attribute: The attribute, such as `User.avatar`.
        preview: The variant to show in lists, details and forms; None for `preview`, `thumb` or `thumbnail`, where the column
            declares one, and the file itself where a browser can show it.
        options: The options of a field of starlette-admin.
    """

    def __init__(
        self, attribute: InstrumentedAttribute[Any] | Column[Any], *, preview: str | None = None, **options: Any
    ) -> None:
        column = attribute if isinstance(attribute, Column) else attribute.property.columns[0]
        if not isinstance(column.type, AttachmentType):
            raise ConfigurationError(f"AttachmentField takes an attachment attribute such as User.avatar, not {attribute}")
        self.preview = preview
        self.column_type = column.type
        defaults = {"name": attribute.key, "required": not column.nullable, "help_text": column.comment}
        page, form = (f"plugins/{AttachmentPlugin.name}/{name}.html" for name in ("file", "form"))
        templates = {"list_template": page, "detail_template": page, "form_template": form}
        super().__init__(**{**defaults, **templates, "max_size": None, "storage": _Storage(), **options})

    async def parse_form_data(self, request: Request, form_data: FormData) -> Any:
        """Return the new file and whether the present one goes, as a `FileField` does."""
        change = FileChange.of(request, form_data, self.id)
        return change, change.action is FileAction.CLEAR

    async def validate(self, request: Request, value: Any, form_values: dict[str, Any]) -> None:
        """Store the new file, so that what its policy refuses is said at the field; it is deleted unless its row is committed.

        Raises:
            ValueError: The form asks for something impossible, or the file is refused.
        """
        change, cleared = value
        is_new = request.state.action is RequestAction.CREATE
        if problem := change.problem(required=bool(self.required), has_file=not is_new):
            raise ValueError(problem)
        new = None
        if change.upload is not None:
            for validator in self.validators:
                await self._run_validators(request, [validator], change.upload, form_values)
            attachment = await store(change.upload, self.column_type.column)
            request.scope["state"][_STORED].append(attachment)
            new = _File.of(attachment)
        form_values[self.name] = new, cleared

    async def parse_obj(self, request: Request, obj: Any) -> Any:
        """Return the attachment of a row, with the row."""
        attachment = await super().parse_obj(request, obj)
        return _File.of(attachment, obj) if isinstance(attachment, Attachment) else attachment

    async def serialize_value(self, request: Request, value: Any) -> Any:
        """Return what pages show of a file, and its name for exports and look-ups."""
        if not isinstance(value, _File) or value.attachment is None:
            return value
        if request.state.action in (RequestAction.EXPORT, RequestAction.RELATION_LOOKUP):
            return str(value.attachment)
        plugin: AttachmentPlugin = request.app.state.granite_storage
        view = FileView.of(value.attachment, await plugin.url(request, value.row, self.name), self.preview)
        request.scope["state"].setdefault(_VIEWS, {})[self.id] = view
        return asdict(view)  # which may become JSON

    def render_files(self, data: dict[str, Any]) -> Markup:
        """Return the HTML of a list or of details."""
        return render_file(FileView(**data))

    def render_form(self, request: Request, data: Any, error: Any) -> Markup:
        """Return the HTML of the form; one that is shown again shows the present file, and the choice that was made."""
        view = FileView(**data) if isinstance(data, dict) else request.scope["state"].get(_VIEWS, {}).get(self.id)
        action = data[0].action if isinstance(data, tuple) and isinstance(data[0], FileChange) else FileAction.KEEP
        required = bool(self.required)
        chosen = render_input(self.id, self.column_type, view, required=required, invalid=error is not None, action=action)
        problem = Markup('<div class="invalid-feedback" id="{}-error">{}</div>').format(self.id, error) if error else ""
        return chosen + problem + Markup('<small class="form-hint">{}</small>').format(self.help_text or "")


class AttachmentPlugin(BasePlugin):
    """The plugin that lets starlette-admin edit and show attachments: `Admin(engine, plugins=[AttachmentPlugin()])`.

    Views need nothing more: an attachment among their `fields` becomes an `AttachmentField`. Files are served to those who may
    see or edit the row, by the panel's own authentication.
    """

    name: ClassVar[str] = "granite-storage"
    package: ClassVar[str | None] = "granite_storage.contrib"

    def setup(self, admin: BaseAdmin) -> None:
        """Register the field of attachment columns."""
        self._admin = admin
        register_converter(AttachmentType)(_convert)

    def on_mount(self, admin: BaseAdmin) -> None:
        """Let the fields find the plugin."""
        assert admin.app is not None  # noqa: S101  # it is mounted
        admin.app.state.granite_storage = self

    def middlewares(self) -> Sequence[Middleware]:
        """Return what deletes the files of forms that were refused."""
        return [Middleware(_Discarding)]

    def routes(self) -> Sequence[Route | Mount]:
        """Return the route of the files."""
        return [Route("/{key}/{field}", self._serve, name="file")]

    async def url(self, request: Request, row: Any, field: str) -> str:
        """Return where a file of a row is served; an empty string where no view of the row's model is registered."""
        view = next((one for one in self._admin._model_views if getattr(one, "model", None) is type(row)), None)
        if view is None:
            return ""
        route = f"{self._admin.route_name}:plugin:{self.name}:file"
        pk = await view.get_pk_value(request, row)
        return str(request.url_for(route, key=view.key, field=field).include_query_params(pk=pk))

    async def _serve(self, request: Request) -> Response:
        request.state.action = RequestAction.DETAIL  # what `find_by_pk` and the fields look at
        view = self._admin._find_view_by_key(request.path_params["key"])
        allowed = {RequestAction.DETAIL: view.can_view_detail, RequestAction.EDIT: view.can_edit}
        actions = [action for action, may in allowed.items() if may(request)] if view.is_accessible(request) else []
        if not actions:
            raise HTTPException(403)
        name = request.path_params["field"]
        fields = [field for action in actions for field in view.get_fields_list(request, action=action)]
        if not any(isinstance(field, AttachmentField) and field.name == name for field in fields):
            raise HTTPException(404)
        try:
            row = await view.find_by_pk(request, request.query_params.get("pk"))
        except (TypeError, ValueError):
            raise HTTPException(404) from None
        return serve(getattr(row, name, None), request)


def _convert(*, name: str, column: Column[Any], **_: Any) -> AttachmentField:
    return AttachmentField(column, name=name)


class _Discarding:
    """Deletes what a request has stored and no row refers to at its end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stored: list[Attachment] = []
        scope.setdefault("state", {})[_STORED] = stored
        async with discarded_unless_assigned(stored):
            await self._app(scope, receive, send)
