"""Attachments in sqladmin: forms that keep, replace or clear a file, previews, and files for the panel's users only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from markupsafe import Markup
from sqladmin import ModelView, expose
from sqladmin.forms import ModelConverter, converts
from sqlalchemy import inspect
from sqlalchemy.orm import ColumnProperty
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from wtforms import Field, ValidationError

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
from granite_storage.exceptions import ContentRejectedError
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.columns import AttachmentType, slots_of

__all__ = ["AttachmentAdmin", "AttachmentConverter", "AttachmentField"]

# The request whose row is edited: sqladmin makes the form of the row without it.
_editing: ContextVar[Request | None] = ContextVar("_editing", default=None)


@dataclass
class _FormFile:
    """The value of a field: the present file, what shall become of it, and the field that shows what is wrong."""

    present: Attachment | None = None
    view: FileView | None = None
    change: FileChange | None = None
    field: AttachmentField | None = None


class _Widget:
    input_type = "file"

    def __call__(self, field: AttachmentField, **_: Any) -> Markup:
        value = field.data or _FormFile()
        return render_input(
            field.name,
            field.column_type,
            value.view,
            required=field.is_required,
            invalid=bool(field.errors),
            action=value.change.action if value.change is not None else FileAction.KEEP,
        )


class AttachmentField(Field):
    """A file of a form; `AttachmentConverter` makes one for each attachment column.

    Args:
        column_type: The type of the column.
        is_required: Whether the row must have a file.
        options: The options of a WTForms field.
    """

    widget = _Widget()
    data: _FormFile | None

    def __init__(self, *, column_type: AttachmentType, is_required: bool, **options: Any) -> None:
        self.column_type = column_type
        self.is_required = is_required
        super().__init__(**options)

    def process_formdata(self, valuelist: list[Any]) -> None:
        """Take what `AttachmentAdmin` has read from the form."""
        if valuelist and isinstance(valuelist[0], _FormFile):
            self.data = valuelist[0]
            self.data.field = self

    def pre_validate(self, form: Any) -> None:
        """Refuse a choice that contradicts itself, and a required file that is missing."""
        value = self.data or _FormFile()
        change = value.change or FileChange()
        if problem := change.problem(required=self.is_required, has_file=value.present is not None):
            raise ValidationError(problem)


class AttachmentConverter(ModelConverter):
    """sqladmin's converter of columns to fields, which knows attachment columns as well."""

    @converts(f"{AttachmentType.__module__}.{AttachmentType.__name__}")
    def convert_attachment(self, model: type, prop: ColumnProperty[Any], kwargs: dict[str, Any]) -> Any:
        """Return the field of an attachment column."""
        column = prop.columns[0]
        return AttachmentField(column_type=cast(AttachmentType, column.type), is_required=not column.nullable, **kwargs)


class AttachmentAdmin(ModelView):
    """A `ModelView` whose model has attachments: `class UserAdmin(AttachmentAdmin, model=User)`.

    A form keeps the present file, replaces or clears it. A new file is stored before the transaction of its row, and is deleted
    unless that is committed; what its policy refuses is said at its field. Files are served to those who may see or edit the row.

    Attributes:
        attachment_previews: The variant to show of an attribute's files, by the attribute's name; otherwise `preview`, `thumb` or
            `thumbnail`, where the column declares one, and the file itself where a browser can show it.
    """

    attachment_previews: ClassVar[dict[str, str]] = {}
    form_converter = AttachmentConverter

    async def create_context(self, request: Request) -> dict[str, Any]:
        """Read the files of the form before sqladmin does."""
        await self._read_files(request, None)
        return await super().create_context(request)

    async def get_object_for_edit(self, request: Request) -> Any:
        """Read the files of the form before sqladmin does."""
        row = await super().get_object_for_edit(request)
        await self._read_files(request, row)
        return row

    async def get_form_data_for_edit(self, obj: Any) -> dict[str, Any]:
        """Return the values of the row's fields, with the files as they are shown."""
        data = await super().get_form_data_for_edit(obj)
        return {key: self._form_file(obj, key) if isinstance(value, Attachment) else value for key, value in data.items()}

    async def insert_model(self, request: Request, data: dict[str, Any]) -> Any:
        """Store the files of the form, and insert the row; a row that is saved as new gets copies of the files it keeps."""
        async with self._stored_files(data) as values:
            return await super().insert_model(request, values)

    async def update_model(self, request: Request, pk: str, data: dict[str, Any]) -> Any:
        """Store the files of the form, and update the row."""
        async with self._stored_files(data) as values:
            kept = [key for key, value in data.items() if isinstance(value, _FormFile) and _action_of(value) is FileAction.KEEP]
            return await super().update_model(request, pk, {key: values[key] for key in values if key not in kept})

    async def get_list_value(self, obj: Any, prop: str, request: Request | None = None) -> tuple[Any, Any]:
        """Return the value of a column, and what the list shows of it."""
        value, shown = await super().get_list_value(obj, prop, request)
        return value, shown if prop in self._list_formatters else self._show(obj, prop, value, shown, request)

    async def get_detail_value(self, obj: Any, prop: str, request: Request | None = None) -> tuple[Any, Any]:
        """Return the value of a column, and what the details show of it."""
        value, shown = await super().get_detail_value(obj, prop, request)
        return value, shown if prop in self._detail_formatters else self._show(obj, prop, value, shown, request)

    async def custom_export_cell(self, row: Any, name: str, value: Any) -> str | None:
        """Export the name of a file."""
        return str(value) if isinstance(value, Attachment) else await super().custom_export_cell(row, name, value)

    @expose("/file/{column}/{pk:path}", methods=["GET"], include_in_schema=False)
    async def serve_attachment(self, request: Request) -> Response:
        """Serve a file of a row to those who may see or edit the row."""
        name = request.path_params["column"]
        if name not in {*self._list_prop_names, *self._details_prop_names, *self._form_prop_names}:
            raise HTTPException(404)
        row = await self.get_object_for_details(request)
        if row is not None and not (await self.check_can_view_details(request, row) or await self.check_can_edit(request, row)):
            raise HTTPException(403)
        return serve(getattr(row, name, None), request)

    async def _read_files(self, request: Request, row: Any) -> None:
        """Put a value that knows the present file in the place of each file of the form.

        sqladmin would take an attachment for a file of its own storage, and neither the form nor the field gets to see the row.
        """
        _editing.set(request)
        if request.method != "POST":
            return
        form = await request.form()
        names = [slot.key for slot in slots_of(inspect(self.model)) if slot.key in self._form_prop_names]
        files: list[Any] = []
        for name in names:
            file = self._form_file(row, name)
            file.change = FileChange.of(request, form, name)
            files.append((name, file))
        request._form = FormData([*((key, value) for key, value in form.multi_items() if key not in names), *files])

    def _form_file(self, row: Any, name: str) -> _FormFile:
        present, request = getattr(row, name, None), _editing.get()
        view = self._view(row, name, present, request) if present is not None and request is not None else None
        return _FormFile(present, view)

    def _view(self, row: Any, name: str, attachment: Attachment, request: Request) -> FileView:
        may_read = self.can_view_details or self.can_edit
        route = f"admin:view-{self.identity}-serve_attachment"
        url = str(request.url_for(route, column=name, pk=self._identifier(row))) if may_read else ""
        return FileView.of(attachment, url, self.attachment_previews.get(name))

    def _identifier(self, row: Any) -> str:
        from sqladmin.helpers import get_object_identifier

        return str(get_object_identifier(row))

    def _show(self, row: Any, name: str, value: Any, shown: Any, request: Request | None) -> Any:
        if not isinstance(value, Attachment):
            return shown
        return str(value) if request is None else render_file(self._view(row, name, value, request))

    @asynccontextmanager
    async def _stored_files(self, data: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Store the new files, and yield the values of the row; raise where one is refused, with the reason at its field."""
        stored: list[Attachment] = []
        values, problems = dict(data), []
        async with discarded_unless_assigned(stored):
            for key, value in data.items():
                if not isinstance(value, _FormFile):
                    continue
                values[key] = value.present if _action_of(value) is FileAction.KEEP else None
                if value.change is None or value.change.upload is None:
                    continue
                try:
                    values[key] = await store(value.change.upload, getattr(self.model, key))
                    stored.append(values[key])
                except ValueError as error:
                    problems.append(f"{key}: {error}")
                    if value.field is not None:
                        value.field.errors = [*value.field.errors, str(error)]
            if problems:
                raise ContentRejectedError(" ".join(problems))
            yield values


def _action_of(file: _FormFile) -> FileAction:
    return FileAction.KEEP if file.change is None else file.change.action
