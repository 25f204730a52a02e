"""Attachments in sqladmin: forms that keep, replace or clear a file, previews, and files for the panel's users only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, ClassVar
from urllib.parse import quote

from markupsafe import Markup
from sqladmin import ModelView, expose
from sqladmin.forms import ModelConverter, ModelConverterBase
from sqladmin.helpers import get_object_identifier
from sqlalchemy.orm import selectinload
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from wtforms import FileField, ValidationError

from granite_storage.contrib import _panels
from granite_storage.contrib._panels import FileAction, FormFile, FormFiles
from granite_storage.exceptions import ContentRejectedError
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.collections import AttachedFile, AttachmentList, declared_collection

__all__ = ["AttachmentAdmin", "AttachmentConverter", "AttachmentField"]

# The request whose row is edited: sqladmin makes the form of the row without it.
_editing: ContextVar[Request | None] = ContextVar("_editing", default=None)


class AttachmentField(FileField):  # type: ignore[misc]  # WTForms has no types
    """The file or the files of an attribute in a form; `AttachmentConverter` makes one for each.

    Args:
        attribute: The attribute of the model.
        **options: The options of a WTForms field.
    """

    data: FormFile | FormFiles | None
    errors: Any

    def __init__(self, *, attribute: Any, **options: Any) -> None:
        self._empty = _panels.form_of(attribute)
        super().__init__(**options)

    def process_formdata(self, valuelist: list[Any]) -> None:
        """Take what `AttachmentAdmin` has read from the form."""
        self.data = next((value for value in valuelist if isinstance(value, FormFile | FormFiles)), None)

    def pre_validate(self, form: Any) -> None:
        """Refuse a choice that contradicts itself, and a required file that is missing."""
        asked = self.data or self._empty
        asked.errors = self.errors  # to which `AttachmentAdmin` adds what a policy refuses
        if problem := asked.problem(required=asked.is_required):
            raise ValidationError(problem)

    def __call__(self, **_: Any) -> Markup:
        """Return the HTML."""
        form = self.data or self._empty
        return form.render(self.name, required=form.is_required, invalid=bool(self.errors))


class AttachmentConverter(ModelConverter):
    """sqladmin's converter of columns to fields, which knows attachments as well."""

    def get_converter(self, prop: Any) -> Any:
        """Return what makes the field of an attribute."""
        return _convert if _panels.is_attached(prop.class_attribute) else super().get_converter(prop)

    async def _prepare_relationship(self, prop: Any, kwargs: dict[str, Any], *args: Any, **options: Any) -> dict[str, Any]:
        if _panels.is_attached(prop.class_attribute):  # sqladmin would load all files of all rows to choose from
            return kwargs
        return await super()._prepare_relationship(prop, kwargs, *args, **options)


def _convert(*, model: type, prop: Any, kwargs: dict[str, Any]) -> AttachmentField:
    return AttachmentField(attribute=prop.class_attribute, **kwargs)


class AttachmentAdmin(ModelView):
    """A `ModelView` whose model has attachments: `class UserAdmin(AttachmentAdmin, model=User)`.

    A form keeps the present file, replaces or clears it; the files of a collection are dragged into an order, removed and added.
    A new file is stored before the transaction of its row, and is deleted unless that is committed; what its policy refuses is
    said at its field. Files are served to those who may see or edit the row.

    Attributes:
        attachment_previews: The variant to show of an attribute's files, by the attribute's name; otherwise `preview`, `thumb` or
            `thumbnail`, where the column declares one, and the file itself where a browser can show it.
    """

    attachment_previews: ClassVar[dict[str, str]] = {}
    form_converter: ClassVar[type[ModelConverterBase]] = AttachmentConverter

    def __init__(self) -> None:
        super().__init__()
        attributes = [getattr(self.model, key) for key in self._prop_names]
        self._attached = [one.key for one in attributes if _panels.is_attached(one)]
        self._collections = [one.key for one in attributes if declared_collection(one) is not None]
        for name, preview in self.attachment_previews.items():
            _panels.require_preview(getattr(self.model, name, name), preview)
        self._non_link_related_fields = [*self._non_link_related_fields, *self._collections]
        for formatters, with_request in (
            (self._list_formatters, self._list_formatter_accepts_request),
            (self._detail_formatters, self._detail_formatter_accepts_request),
        ):
            for name in set(self._attached).difference(formatters):
                formatters[name], with_request[name] = self._show, True
        # On the instance, so that a hook of the application need not call this one.
        vars(self)["on_model_change"] = self._assign_collections

    def _stmt_by_identifier(self, identifier: str) -> Any:
        collections = (selectinload(getattr(self.model, key)) for key in self._collections)  # whatever their `lazy=` says
        return super()._stmt_by_identifier(identifier).options(*collections)

    async def create_context(self, request: Request) -> dict[str, Any]:
        """Read the files of the form before sqladmin does."""
        await self._read_files(request, None)
        return await super().create_context(request)

    async def get_object_for_details(self, request: Request) -> Any:
        """Return a row; a key that no row can have is answered with 404."""
        return await _panels.existing(super().get_object_for_details(request))

    async def get_object_for_edit(self, request: Request) -> Any:
        """Read the files of the form before sqladmin does."""
        row = await _panels.existing(super().get_object_for_edit(request))
        await self._read_files(request, row)
        return row

    async def get_form_data_for_edit(self, obj: Any) -> dict[str, Any]:
        """Return the values of the row's fields, with the files as they are shown."""
        data = await super().get_form_data_for_edit(obj)
        return {key: self._form_of(obj, key) if key in self._attached else value for key, value in data.items()}

    async def insert_model(self, request: Request, data: dict[str, Any]) -> Any:
        """Store the files of the form, and insert the row; a row that is saved as new gets copies of the files it keeps."""
        async with self._stored_files(data, is_new=True) as values:
            return await super().insert_model(request, values)

    async def update_model(self, request: Request, pk: str, data: dict[str, Any]) -> Any:
        """Store the files of the form, and update the row."""
        async with self._stored_files(data, is_new=False) as values:
            return await super().update_model(request, pk, values)

    async def get_prop_value(self, obj: Any, prop: str) -> Any:
        """Return the value of an attribute; the names of the files for a collection."""
        value = await super().get_prop_value(obj, prop)
        return ", ".join(str(one.file) for one in value) if isinstance(value, AttachmentList) else value

    async def custom_export_cell(self, row: Any, name: str, value: Any) -> str | None:
        """Export the name of a file."""
        return str(value or "") if name in self._attached else await super().custom_export_cell(row, name, value)

    @expose("/file/{column}/{pk:path}", methods=["GET"], include_in_schema=False)
    async def serve_attachment(self, request: Request) -> Response:
        """Serve a file of a row to those who may see or edit the row."""
        name = request.path_params["column"]
        shown = {*self._list_prop_names, *self._details_prop_names, *self._form_prop_names}.intersection(self._attached)
        row = await self.get_object_for_details(request) if name in shown else None
        if row is None:
            raise HTTPException(404)
        if not (await self.check_can_view_details(request, row) or await self.check_can_edit(request, row)):
            raise HTTPException(403)
        return _panels.serve(await super().get_prop_value(row, name), request)

    async def _read_files(self, request: Request, row: Any) -> None:
        # sqladmin would take an attachment for a file of its own storage, and neither the form nor the field gets to see the row.
        _editing.set(request)
        if request.method != "POST":
            return
        form = await request.form()
        names = [name for name in self._attached if name in self._form_prop_names]
        values: list[Any] = [(name, self._form_of(row, name).read(request, form, name)) for name in names]
        request._form = FormData([*((key, item) for key, item in form.multi_items() if key not in names), *values])

    def _form_of(self, row: Any, name: str) -> FormFile | FormFiles:
        value, views = getattr(row, name, None), self._views(row, name, _editing.get())
        return _panels.form_of(getattr(self.model, name), value, views)

    def _views(self, row: Any, name: str, request: Request | None) -> list[_panels.FileView]:
        value, url = getattr(row, name, None), ""
        if request is not None and value and (self.can_view_details or self.can_edit):
            route = f"admin:view-{self.identity}-serve_attachment"
            url = str(request.url_for(route, column=name, pk=quote(str(get_object_identifier(row)))))
        return _panels.views_of(value, url, self.attachment_previews.get(name))

    def _show(self, row: Any, name: str, request: Request | None = None) -> Markup:
        return _panels.render_files(self._views(row, name, request))

    @asynccontextmanager
    async def _stored_files(self, data: dict[str, Any], *, is_new: bool) -> AsyncIterator[dict[str, Any]]:
        stored: list[Attachment] = []
        values = {key: value for key, value in data.items() if not isinstance(value, FormFile | FormFiles)}
        forms = {key: value for key, value in data.items() if isinstance(value, FormFile | FormFiles)}
        async with _panels.discarded_unless_assigned(stored):
            for key, form in forms.items():
                try:
                    new = await form.store(stored)
                    if isinstance(form, FormFiles):
                        files = form.arrange(form.value, new)
                        copies = (file.copy() if isinstance(file, AttachedFile) else file for file in files)
                        values[key] = list(copies) if is_new else (form, new)
                    elif is_new or form.action is not FileAction.KEEP:
                        values[key] = next(iter(new), form.value if form.action is FileAction.KEEP else None)
                except _panels.RefusedError as error:
                    form.errors.append(str(error))
            if problems := [f"{key}: {error}" for key, form in forms.items() for error in form.errors]:
                raise ContentRejectedError(" ".join(problems))
            with _panels.readable():
                yield values

    async def _assign_collections(self, data: dict[str, Any], model: Any, is_created: bool, request: Request) -> None:
        if model is None:
            raise _panels.RefusedError(_panels.GONE)
        for key in [name for name in self._collections if name in data]:
            files = data.pop(key)
            setattr(model, key, files if is_created else files[0].arrange(getattr(model, key), files[1]))
        await type(self).on_model_change(self, data, model, is_created, request)
