"""Attachments in starlette-admin: forms that keep, replace or clear a file, previews, and files for the panel's users only."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

from anyio.to_thread import run_sync
from markupsafe import Markup
from sqlalchemy import inspect
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
from starlette_admin.exceptions import FormValidationError
from starlette_admin.fields import FileField
from starlette_admin.plugins import BasePlugin
from starlette_admin.storage import FileInfo
from starlette_admin.types import RequestAction

from granite_storage.contrib import _panels
from granite_storage.contrib._panels import FileAction, FileView, FormFile, FormFiles
from granite_storage.exceptions import ConfigurationError
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.collections import AttachedFile, AttachmentList, declared_collection
from granite_storage.orm.columns import AttachmentType

__all__ = ["AttachmentField", "AttachmentPlugin"]

_KNOWN = "granite_storage"


@dataclass(frozen=True, eq=False)
class _File(FileInfo):
    """An attachment as starlette-admin takes a stored file: `to_dict` returns what the attribute of the row is set to."""

    row: Any = None
    attachment: Any = None
    shown: Any = None

    @classmethod
    def of(cls, attachment: Attachment, row: Any = None, file: AttachedFile | None = None) -> Self:
        name = attachment.original_filename or "file" if attachment._state.error is None else "unreadable"
        return cls(name, "", 0, "", "", row=row, attachment=attachment, shown=file or attachment)

    def to_dict(self) -> Any:
        return self.attachment


class _Storage:
    """Passes on what `AttachmentField` has stored already: starlette-admin keeps the present file of a field with a storage."""

    async def save(self, upload: Any, dest: str) -> Any:
        return upload


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
        is_collection = declared_collection(attribute) is not None
        required = not is_collection and not attribute.type.column.nullable
        page, form = (f"plugins/{AttachmentPlugin.name}/{name}.html" for name in ("file", "form"))
        templates = {"list_template": page, "detail_template": page, "form_template": form}
        defaults = {"name": attribute.key, "required": required, "multiple": is_collection, "max_size": None, **templates}
        super().__init__(**{"help_text": attribute.type.column.comment, **defaults, "storage": _Storage(), **options})

    async def parse_form_data(self, request: Request, form_data: FormData) -> Any:
        """Return what the form asks for, and whether the present file goes, as a `FileField` does.

        Raises:
            ValueError: It is the form of a row within the form of another one, and takes several files.
        """
        is_inline, is_edited = self.id != self.name, request.state.action is RequestAction.EDIT
        if is_inline and self.multiple:
            raise ValueError("Several files cannot be edited in an inline row: edit the row on its own page.")
        has_row = form_data.get(f"{self.id.removesuffix(self.name)}pk") if is_inline else is_edited or None
        form = (FormFiles if self.multiple else FormFile)(has_row or None).read(request, form_data, self.id)
        return form, isinstance(form, FormFile) and form.action is FileAction.CLEAR

    async def validate(self, request: Request, value: Any, form_values: dict[str, Any]) -> None:
        """Store the new files, so that what a policy refuses is said at the field; they are deleted unless the row is committed.

        Raises:
            ValueError: The form asks for something impossible, or a file is refused.
        """
        form, cleared = value
        if problem := form.problem(required=bool(self.required)):
            raise ValueError(problem)
        for upload in form.uploads:
            await self._run_validators(request, self.validators, upload, form_values)
        new = await form.store(self.attribute, _known(request).stored)
        if isinstance(form, FormFiles) and form.value is None:
            form.arrange(self.attribute, (), new)
        elif isinstance(form, FormFiles):
            _known(request).changes[id(self)], new = (form, new), []
        files = [_File.of(one) for one in new]
        form_values[self.name] = files if self.multiple else next(iter(files), None), cleared

    async def parse_obj(self, request: Request, obj: Any) -> Any:
        """Return the attachment of a row with the row; for a collection, its files as the form that is being saved wants them."""
        value = await _load(request, obj, self.name) if self.multiple else await super().parse_obj(request, obj)
        if isinstance(value, Attachment):
            return _File.of(value, obj)
        if not isinstance(value, AttachmentList):
            return value
        form, new = _known(request).changes.get(id(self), (None, ()))
        if form is None:
            return [_File.of(one.file, obj, one) for one in value]
        try:
            return form.arrange(self.attribute, value, new)
        except _panels.RefusedError as error:
            raise FormValidationError({self.name: str(error)}) from error

    async def serialize_value(self, request: Request, value: Any) -> Any:
        """Return what pages show of the files, and their names for exports and look-ups."""
        files: list[_File] = value if isinstance(value, list) else [value]
        if request.state.action in (RequestAction.EXPORT, RequestAction.RELATION_LOOKUP):
            return ", ".join(str(one.attachment) for one in files)
        urls = [await _known(request).plugin.url(request, one.row, self.name) for one in files]
        views = [FileView.of(one.shown, url, self.preview) for one, url in zip(files, urls, strict=True)]
        _known(request).views |= dict.fromkeys(urls, views)
        return [asdict(view) for view in views]  # which may become JSON

    def render_files(self, data: list[dict[str, Any]]) -> Markup:
        """Return the HTML of a list or of details."""
        return _panels.render_files(FileView(**view) for view in data)

    def render_form(self, request: Request, data: Any, error: Any) -> Markup:
        """Return the HTML of the form; one that is shown again shows the present file, and the choice that was made."""
        asked = data[0] if isinstance(data, tuple) else None
        form = asked if isinstance(asked, FormFile | FormFiles) else (FormFiles if self.multiple else FormFile)()
        key, pk = request.path_params["key"], request.query_params.get("pk")
        shown = _known(request).views.get(_url(request, key, self.name, pk), ())
        form.views = [FileView(**view) for view in data] if isinstance(data, list) else shown
        chooser = form.render(self.id, self.attribute.type, required=bool(self.required), invalid=error is not None)
        problem = Markup('<div class="invalid-feedback" id="{}-error">{}</div>').format(self.id, error) if error else ""
        return chooser + problem + Markup('<small class="form-hint">{}</small>').format(self.help_text or "")


@dataclass
class _Known:
    """What a request has stored, what it shows by the address of the files, and what becomes of collections by their fields."""

    plugin: AttachmentPlugin
    stored: list[Attachment] = field(default_factory=list)
    views: dict[str, list[FileView]] = field(default_factory=dict)
    changes: dict[int, tuple[FormFiles, list[Attachment]]] = field(default_factory=dict)


def _known(request: Request) -> _Known:
    known: _Known = request.scope["state"][_KNOWN]
    return known


def _url(request: Request, key: Any, name: str, pk: Any) -> str:
    route = f"{request.app.state.ROUTE_NAME}:plugin:{AttachmentPlugin.name}:file"
    return str(request.url_for(route, key=key, field=name).include_query_params(pk=pk))


async def _load(request: Request, row: Any, name: str) -> Any:
    """Return a collection, which a session loads where it is not loaded yet."""
    session = request.state.session
    if name in inspect(row).dict:
        return getattr(row, name)
    if isinstance(session, AsyncSession):
        return await session.run_sync(lambda _: getattr(row, name))
    return await run_sync(getattr, row, name)


async def _handle_exception(view: ModelView, handle: Callable[..., Any], request: Request, error: Exception) -> None:
    """Call the hook of a view, and let the form say what the storage or the database refuses."""
    try:
        with _panels.readable():
            await handle(request, error)
    except _panels.RefusedError as refusal:
        names = [field.name for field in view.get_fields_list(request)]
        blamed = next((name for name in names if re.search(rf"\b{name}\b", str(refusal))), names[0])
        raise FormValidationError({blamed: str(refusal)}) from refusal


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
        """Let the forms of views with attachments say what the storage or the database refuses."""
        for view in admin._model_views:
            for one in (view, *view._inline_instances):
                if isinstance(one, ModelView) and any(isinstance(field, AttachmentField) for field in one._all_fields):
                    # On the instance, which the application's class may have a hook of its own for.
                    vars(one)["handle_exception"] = partial(_handle_exception, one, one.handle_exception)

    def middlewares(self) -> Sequence[Middleware]:
        """Return what deletes the files of forms that were refused."""
        return [Middleware(_Discarding, plugin=self)]

    def routes(self) -> Sequence[Route | Mount]:
        """Return the route of the files."""
        return [Route("/{key}/{field}", self._serve, name="file")]

    async def url(self, request: Request, row: Any, name: str) -> str:
        """Return where a file of a row is served; an empty string where no view of the row's model is registered."""
        view = next((one for one in self._admin._model_views if getattr(one, "model", None) is type(row)), None)
        return "" if view is None else _url(request, view.key, name, await view.get_pk_value(request, row))

    async def _serve(self, request: Request) -> Response:
        request.state.action = RequestAction.DETAIL  # what `find_by_pk` and the fields look at
        view = self._admin._find_view_by_key(request.path_params["key"])
        allowed = {RequestAction.DETAIL: view.can_view_detail, RequestAction.EDIT: view.can_edit}
        actions = [action for action, may in allowed.items() if may(request)] if view.is_accessible(request) else []
        if not actions:
            raise HTTPException(403)
        name, pk = request.path_params["field"], request.query_params.get("pk")
        fields = [one for action in actions for one in view.get_fields_list(request, action=action)]
        is_shown = any(isinstance(one, AttachmentField) and one.name == name for one in fields)
        with _panels.existing():
            row = await view.find_by_pk(request, pk) if is_shown else None
        return _panels.serve(await _load(request, row, name) if row is not None else None, request)


class _Discarding:
    """Deletes what a request has stored and no row refers to at its end."""

    def __init__(self, app: ASGIApp, plugin: AttachmentPlugin) -> None:
        self._app, self._plugin = app, plugin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        known = scope.setdefault("state", {})[_KNOWN] = _Known(self._plugin)
        async with _panels.discarded_unless_assigned(known.stored):
            await self._app(scope, receive, send)
