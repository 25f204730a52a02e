"""Attachments in starlette-admin: forms that keep, replace or clear a file, previews, and files for the panel's users only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

from anyio.to_thread import run_sync
from markupsafe import Markup
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
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
        ConfigurationError: The attribute has no attachments, or declares no variant `preview`.
    """

    def __init__(self, attribute: Any, *, preview: str | None = None, **options: Any) -> None:
        if not _panels.is_attached(attribute):
            raise ConfigurationError(f"AttachmentField takes an attribute of attachments such as User.avatar, not {attribute}")
        _panels.require_preview(attribute, preview)
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
        known: _panels.Known = request.state.granite_storage
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
        value = await run(lambda *_: _panels.load(row, self.name))
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


async def _find_by_pk(view: ModelView, find: Callable[..., Any], request: Request, pk: Any) -> Any:
    row = await _panels.existing(find(request, pk))
    if row is None:  # it may have been deleted while the form was received
        raise HTTPException(404)
    request.state.granite_storage.rows.append(row)
    return row


async def _find_by_pks(view: ModelView, find: Callable[..., Any], request: Request, pks: list[Any]) -> Any:
    return await _panels.existing(find(request, pks))


def _query(view: ModelView, query: Callable[..., Any], request: Request) -> Any:
    """Return a query that also loads the collections that are shown, whatever their `lazy=` says."""
    names = [one.name for one in view.get_fields_list(request) if isinstance(one, AttachmentField) and one.multiple]
    return query(request).options(*(selectinload(getattr(view.model, name)) for name in names))


async def _show_refusal(view: ModelView, call: Callable[..., Any], request: Request, argument: Any) -> Any:
    """Call a method of a view, and let the form, or the list, say what the storage or the database refuses."""
    try:
        with _panels.readable():
            return await call(request, argument)
    except _panels.RefusedError as refusal:
        if request.state.action in (RequestAction.ACTION, RequestAction.ROW_ACTION):
            raise ActionFailed(str(refusal)) from refusal
        name = _panels.find_field(view.model, view.get_fields_list(request), refusal)
        raise FormValidationError({name: str(refusal)}) from refusal


_WRAPPERS: dict[str, Callable[..., Any]] = {"find_by_pk": _find_by_pk, "find_by_pks": _find_by_pks}
_WRAPPERS |= dict.fromkeys(("delete", "handle_exception"), _show_refusal) | dict.fromkeys(
    ("get_list_query", "get_detail_query"), _query
)


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
        for view in (one for each in admin._model_views for one in (each, *each._inline_instances)):
            if isinstance(view, ModelView) and any(isinstance(field, AttachmentField) for field in view._all_fields):
                # On the instance, which the application's class may have hooks of its own for.
                vars(view).update({name: partial(wrap, view, getattr(view, name)) for name, wrap in _WRAPPERS.items()})

    def middlewares(self) -> Sequence[Middleware]:
        """Return what deletes the files of forms that were refused."""
        return [Middleware(_panels.remember, plugin=self)]

    def routes(self) -> Sequence[Route | Mount]:
        """Return the route of the files."""
        return [Route("/{key}/{field}", self._serve, name="file")]

    async def url(self, request: Request, row: Any, name: str) -> str:
        """Return where a file of a row is served: by the view of the page, or by another one where the page is of another model.

        Returns:
            An empty string where no view serves it to the user.
        """
        views = [one for one in self._admin._model_views if isinstance(row, getattr(one, "model", ()))]
        own = [one for one in views if one.key == request.path_params.get("key")]
        view = next((one for one in own or views if name in (_served(one, request) or ())), None)
        if view is None:
            return ""
        pk, route = await view.get_pk_value(request, row), f"{request.app.state.ROUTE_NAME}:plugin:{self.name}:file"
        return str(request.url_for(route, key=view.key, field=name).include_query_params(pk=pk))

    async def _serve(self, request: Request) -> Response:
        request.state.action = RequestAction.DETAIL  # what `find_by_pk` and the fields look at
        view = self._admin._find_view_by_key(request.path_params["key"])
        if (fields := _served(view, request)) is None:
            raise HTTPException(403)
        if (found := fields.get(request.path_params["field"])) is None:
            raise HTTPException(404)
        row = await view.find_by_pk(request, request.query_params.get("pk"))
        return _panels.serve((await found.read(request, row))[0], request)


def _served(view: Any, request: Request) -> dict[str, AttachmentField] | None:
    """Return the attributes whose files a view serves to the user; None where the user may see no row of it."""
    checks = ((RequestAction.DETAIL, view.can_view_detail), (RequestAction.EDIT, view.can_edit))
    allowed = [action for action, may in checks if may(request)] if view.is_accessible(request) else []
    fields = [one for action in allowed for one in view.get_fields_list(request, action=action)]
    return {one.name: one for one in fields if isinstance(one, AttachmentField)} if fields else None
