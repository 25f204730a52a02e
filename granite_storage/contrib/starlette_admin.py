"""Attachments in starlette-admin: forms that keep, replace or clear a file, previews, and files for the panel's users only."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar

from anyio.to_thread import run_sync
from markupsafe import Markup
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette_admin.base import BaseAdmin
from starlette_admin.contrib.sqla import ModelView
from starlette_admin.contrib.sqla.converters import register_converter
from starlette_admin.exceptions import ActionFailed, FormValidationError
from starlette_admin.fields import FileField
from starlette_admin.plugins import BasePlugin
from starlette_admin.storage import FileInfo
from starlette_admin.types import RequestAction

from granite_storage.contrib import _panels
from granite_storage.exceptions import ConfigurationError
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.columns import AttachmentType

__all__ = ["AttachmentField", "AttachmentPlugin"]


class _File(FileInfo):
    """An attachment as starlette-admin takes a stored file: `to_dict` returns what the attribute of the row is set to."""

    def to_dict(self) -> Any:
        return self.extra["attachment"]


class _Storage:
    """Passes on what `AttachmentField` has stored already: starlette-admin keeps the present file of a field with a storage."""

    async def save(self, upload: Any, dest: str) -> Any:
        return upload


def _file(attachment: Attachment, view: _panels.FileView | None = None) -> _File:
    return _File("file", "", 0, "", "", extra={"attachment": attachment, "view": view})


@dataclass(init=False)
class AttachmentField(FileField):
    """The file or the files of an attribute, for the `fields` of a view; `AttachmentPlugin` makes one for each attachment column.

    Args:
        attribute: The attribute, such as `User.avatar`; a collection must be named so.
        preview: The variant to show in lists, details and forms; None for `preview`, `thumb` or `thumbnail`, where the column
            declares one, and the file itself where a browser can show it.
        **options: The options of a field of starlette-admin.

    Raises:
        ConfigurationError: The attribute has no attachments.
    """

    def __init__(self, attribute: Any, *, preview: str | None = None, **options: Any) -> None:
        if not _panels.is_attached(attribute):
            raise ConfigurationError(f"AttachmentField takes an attribute of attachments such as User.avatar, not {attribute}")
        self.attribute = attribute
        self.preview = preview
        page, template = (f"plugins/{AttachmentPlugin.name}/{name}.html" for name in ("file", "form"))
        templates = {"list_template": page, "detail_template": page, "form_template": template}
        form = _panels.form_of(attribute)
        kind = {"required": form.is_required, "multiple": isinstance(form, _panels.FormFiles), "max_size": None}
        named = {"name": attribute.key, "help_text": attribute.type.column.comment, "storage": _Storage()}
        super().__init__(**{**named, **kind, **templates, **options})

    async def parse_form_data(self, request: Request, form_data: FormData) -> Any:
        """Return what the form asks for, and whether the present file goes, as a `FileField` does.

        Raises:
            ValueError: It is the form of a row within the form of another one, and takes several files.
        """
        known: _Known = request.state.granite_storage
        if self.id == self.name:
            value, views = await self.read(request, known.rows[0]) if known.rows else (None, [])
        elif self.multiple:
            raise ValueError("Several files cannot be edited in an inline row: edit the row on its own page.")
        else:
            value, views = form_data.get(f"{self.id.removesuffix(self.name)}pk") or None, []
        known.forms[self.id] = form = _panels.form_of(self.attribute, value, views).read(request, form_data, self.id)
        return form, False

    async def validate(self, request: Request, value: Any, form_values: dict[str, Any]) -> None:
        """Store the new files, so that what a policy refuses is said at the field; they are deleted unless the row is committed.

        Raises:
            ValueError: The form asks for something impossible, or a file is refused.
        """
        form: _panels.FormFile | _panels.FormFiles = value[0]
        if problem := form.problem(required=bool(self.required)):
            raise ValueError(problem)
        for upload in form.uploads:
            await self._run_validators(request, self.validators, upload, form_values)
        new = await form.store(request.state.granite_storage.stored)
        infos = [_file(one) for one in form.arrange(form.value, new)]
        cleared = not isinstance(form, _panels.FormFile) or form.action is _panels.FileAction.CLEAR
        form_values[self.name] = infos if self.multiple else next(iter(infos), None), cleared

    async def parse_obj(self, request: Request, obj: Any) -> Any:
        """Return the attachment of a row, or what is shown of the files of a collection."""
        value, views = await self.read(request, obj)
        return _file(value, views[0]) if isinstance(value, Attachment) else views if self.multiple else None

    async def read(self, request: Request, row: Any) -> tuple[Any, list[_panels.FileView]]:
        """Return the value of the attribute of a row, which is loaded where it is not yet, and what is shown of it."""
        session = request.state.session
        run = session.run_sync if isinstance(session, AsyncSession) else run_sync
        value = await run(lambda *_: getattr(row, self.name))
        url = await request.state.granite_storage.plugin.url(request, row, self.name) if value else ""
        return value, _panels.views_of(value, url, self.preview)

    async def serialize_value(self, request: Request, value: Any) -> Any:
        """Return what pages show of the files, and their names for exports and look-ups."""
        views: list[_panels.FileView] = value if isinstance(value, list) else [value.extra["view"]]
        if request.state.action in (RequestAction.EXPORT, RequestAction.RELATION_LOOKUP):
            return ", ".join(view.name for view in views)
        return [asdict(view) for view in views]  # which may become JSON

    def render_files(self, data: list[dict[str, Any]]) -> Markup:
        """Return the HTML of a list or of details."""
        return _panels.render_files(_panels.FileView(**view) for view in data)

    def render_form(self, request: Request, data: Any, error: Any) -> Markup:
        """Return the HTML of the form; one that is shown again shows the present file, and the choice that was made."""
        asked = request.state.granite_storage.forms.get(self.id)
        form = asked or _panels.form_of(self.attribute, views=[_panels.FileView(**view) for view in data or ()])
        return form.render(self.id, required=bool(self.required), invalid=error is not None)


@dataclass
class _Known:
    """What is known of a request: the rows that it has found, first that of its page, what it has stored, and its forms."""

    plugin: AttachmentPlugin
    rows: list[Any] = field(default_factory=list)
    stored: list[Attachment] = field(default_factory=list)
    forms: dict[str, _panels.FormFile | _panels.FormFiles] = field(default_factory=dict)


async def _find(find: Callable[..., Any], request: Request, pk: Any) -> Any:
    row = await _panels.existing(find(request, pk))
    if row is None:  # it may have been deleted while the form was received
        raise HTTPException(404)
    request.state.granite_storage.rows.append(row)
    return row


async def _handle_exception(view: ModelView, handle: Callable[..., Any], request: Request, error: Exception) -> None:
    """Call the hook of a view, and let the form say what the storage or the database refuses."""
    try:
        with _panels.readable():
            await handle(request, error)
    except _panels.RefusedError as refusal:
        raise _at_field(view, request, refusal) from refusal


def _at_field(view: ModelView, request: Request, refusal: Exception) -> FormValidationError:
    """Return the error of the field that a refusal names, or else of the first one."""
    names = [field.name for field in view.get_fields_list(request)]
    blamed = next((name for name in names if re.search(rf"\b{name}\b", str(refusal))), names[0])
    return FormValidationError({blamed: str(refusal)})


async def _delete(view: ModelView, delete: Callable[..., Any], request: Request, keys: list[Any]) -> Any:
    """Delete rows, and let the list, or the form that they are within, say what the database refuses."""
    try:
        with _panels.readable():
            return await delete(request, keys)
    except _panels.RefusedError as refusal:
        is_alone = request.state.action in (RequestAction.ACTION, RequestAction.ROW_ACTION)
        raise ActionFailed(str(refusal)) if is_alone else _at_field(view, request, refusal) from refusal


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
        register_converter(AttachmentType)(lambda *, name, column, **_: AttachmentField(column, name=name))

    def on_mount(self, admin: BaseAdmin) -> None:
        """Let the forms of views with attachments say what the storage or the database refuses, and no key be an error."""
        for view in admin._model_views:
            for one in (view, *view._inline_instances):
                if isinstance(one, ModelView) and any(isinstance(field, AttachmentField) for field in one._all_fields):
                    # On the instance, which the application's class may have hooks of its own for.
                    vars(one)["find_by_pk"] = partial(_find, one.find_by_pk)
                    vars(one)["handle_exception"] = partial(_handle_exception, one, one.handle_exception)
                    vars(one)["delete"] = partial(_delete, one, one.delete)

    def middlewares(self) -> Sequence[Middleware]:
        """Return what deletes the files of forms that were refused."""
        return [Middleware(_discarding, plugin=self)]

    def routes(self) -> Sequence[Route | Mount]:
        """Return the route of the files."""
        return [Route("/{key}/{field}", self._serve, name="file")]

    async def url(self, request: Request, row: Any, name: str) -> str:
        """Return where a file of a row is served; an empty string where no view of the row's model is registered."""
        view = next((one for one in self._admin._model_views if getattr(one, "model", None) is type(row)), None)
        if view is None:
            return ""
        pk, route = await view.get_pk_value(request, row), f"{request.app.state.ROUTE_NAME}:plugin:{self.name}:file"
        return str(request.url_for(route, key=view.key, field=name).include_query_params(pk=pk))

    async def _serve(self, request: Request) -> Response:
        request.state.action = RequestAction.DETAIL  # what `find_by_pk` and the fields look at
        view = self._admin._find_view_by_key(request.path_params["key"])
        checks = ((RequestAction.DETAIL, view.can_view_detail), (RequestAction.EDIT, view.can_edit))
        fields = [one for action, may in checks if may(request) for one in view.get_fields_list(request, action=action)]
        if not fields or not view.is_accessible(request):
            raise HTTPException(403)
        named = (one for one in fields if isinstance(one, AttachmentField) and one.name == request.path_params["field"])
        if (found := next(named, None)) is None:
            raise HTTPException(404)
        row = await view.find_by_pk(request, request.query_params.get("pk"))
        return _panels.serve((await found.read(request, row))[0], request)


def _discarding(app: ASGIApp, plugin: AttachmentPlugin) -> ASGIApp:
    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        known = scope.setdefault("state", {})["granite_storage"] = _Known(plugin)
        async with _panels.discarded_unless_assigned(known.stored):
            await app(scope, receive, send)

    return call
