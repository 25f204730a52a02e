"""Attachments in sqladmin: forms that keep, replace or clear a file, previews, and files for the panel's users only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

from markupsafe import Markup
from sqladmin import ModelView, expose
from sqladmin.forms import ModelConverter
from sqladmin.helpers import get_object_identifier
from sqlalchemy import event, inspect
from sqlalchemy.orm import object_session
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from wtforms import Field, ValidationError

from granite_storage.contrib._panels import (
    FileAction,
    FileView,
    FormFile,
    FormFiles,
    discarded_unless_assigned,
    render_file,
    serve,
    store,
)
from granite_storage.exceptions import ContentRejectedError
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.collections import AttachmentList, declared_collection
from granite_storage.orm.columns import AttachmentType

__all__ = ["AttachmentAdmin", "AttachmentConverter", "AttachmentField"]

# The request whose row is edited: sqladmin makes the form of the row without it.
_editing: ContextVar[Request | None] = ContextVar("_editing", default=None)


@dataclass
class _Value:
    """The value of a field: what the row has, what the form asks for, and the field that says what is wrong."""

    present: Attachment | AttachmentList | None
    form: FormFile | FormFiles
    field: AttachmentField | None = None


class _Widget:
    input_type = "file"

    def __call__(self, field: AttachmentField, **_: Any) -> Markup:
        form = field.data.form if field.data else FormFiles() if field.is_collection else FormFile()
        return form.render(field.name, field.column_type, required=field.is_required, invalid=bool(field.errors))


class AttachmentField(Field):  # type: ignore[misc]  # WTForms has no types
    """The file or the files of an attribute in a form; `AttachmentConverter` makes one for each.

    Args:
        column_type: The type of the column of the files.
        is_required: Whether the row must have a file.
        is_collection: Whether it may have several.
        **options: The options of a WTForms field.
    """

    widget = _Widget()
    data: _Value | None

    def __init__(self, *, column_type: AttachmentType, is_required: bool, is_collection: bool, **options: Any) -> None:
        self.column_type = column_type
        self.is_required = is_required
        self.is_collection = is_collection
        super().__init__(**options)

    def process_formdata(self, valuelist: list[Any]) -> None:
        """Take what `AttachmentAdmin` has read from the form."""
        if valuelist and isinstance(valuelist[0], _Value):
            self.data = valuelist[0]
            self.data.field = self

    def pre_validate(self, form: Any) -> None:
        """Refuse a choice that contradicts itself, and a required file that is missing."""
        has_file = self.data is not None and self.data.present is not None
        asked = self.data.form if self.data is not None else FormFile()
        if problem := asked.problem(required=self.is_required, has_file=has_file):
            raise ValidationError(problem)


class AttachmentConverter(ModelConverter):
    """sqladmin's converter of columns to fields, which knows attachments as well."""

    def get_converter(self, prop: Any) -> Any:
        """Return what makes the field of an attribute."""
        return _convert if _is_attached(prop) else super().get_converter(prop)

    async def _prepare_relationship(self, prop: Any, kwargs: dict[str, Any], *args: Any, **options: Any) -> dict[str, Any]:
        # sqladmin would load all files of all rows to choose from.
        return kwargs if _is_attached(prop) else await super()._prepare_relationship(prop, kwargs, *args, **options)


def _is_attached(prop: Any) -> bool:
    return declared_collection(prop.class_attribute) is not None or isinstance(
        getattr(prop.class_attribute, "type", None), AttachmentType
    )


def _convert(*, model: type, prop: Any, kwargs: dict[str, Any]) -> Any:
    attribute = prop.class_attribute
    is_collection = declared_collection(attribute) is not None
    is_required = not is_collection and not prop.columns[0].nullable
    return AttachmentField(column_type=attribute.type, is_required=is_required, is_collection=is_collection, **kwargs)


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
    form_converter = AttachmentConverter

    def __init__(self) -> None:
        super().__init__()
        attached = [prop for prop in inspect(self.model).attrs if _is_attached(prop)]
        self._attached = [prop.key for prop in attached]
        self._collections = [prop.key for prop in attached if declared_collection(prop.class_attribute) is not None]
        self._non_link_related_fields = [*self._non_link_related_fields, *self._collections]
        # On the instance, so that a hook of the application need not call this one.
        self.on_model_change = self._assign_collections  # type: ignore[method-assign]

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
        return {key: self._value_of(obj, key) if key in self._attached else value for key, value in data.items()}

    async def insert_model(self, request: Request, data: dict[str, Any]) -> Any:
        """Store the files of the form, and insert the row; a row that is saved as new gets copies of the files it keeps."""
        async with self._stored_files(data) as new:
            values = {key: _inserted(value, new[key]) if isinstance(value, _Value) else value for key, value in data.items()}
            return await super().insert_model(request, values)

    async def update_model(self, request: Request, pk: str, data: dict[str, Any]) -> Any:
        """Store the files of the form, and update the row."""
        async with self._stored_files(data) as new:
            values: dict[str, Any] = {}
            for key, value in data.items():
                if not isinstance(value, _Value):
                    values[key] = value
                elif isinstance(value.form, FormFiles):
                    values[key] = value.form, new[key]
                elif value.form.action is not FileAction.KEEP:
                    values[key] = next(iter(new[key]), None)
            return await super().update_model(request, pk, values)

    async def get_prop_value(self, obj: Any, prop: str) -> Any:
        """Return the value of an attribute; the names of the files for a collection."""
        value = await super().get_prop_value(obj, prop)
        return ", ".join(str(one.file) for one in value) if isinstance(value, AttachmentList) else value

    async def get_list_value(self, obj: Any, prop: str, request: Request | None = None) -> tuple[Any, Any]:
        """Return the value of a column, and what the list shows of it."""
        value, shown = await super().get_list_value(obj, prop, request)
        return value, shown if prop in self._list_formatters else self._show(obj, prop, shown, request)

    async def get_detail_value(self, obj: Any, prop: str, request: Request | None = None) -> tuple[Any, Any]:
        """Return the value of a column, and what the details show of it."""
        value, shown = await super().get_detail_value(obj, prop, request)
        return value, shown if prop in self._detail_formatters else self._show(obj, prop, shown, request)

    async def custom_export_cell(self, row: Any, name: str, value: Any) -> str | None:
        """Export the name of a file."""
        return str(value or "") if name in self._attached else await super().custom_export_cell(row, name, value)

    @expose("/file/{column}/{pk:path}", methods=["GET"], include_in_schema=False)
    async def serve_attachment(self, request: Request) -> Response:
        """Serve a file of a row to those who may see or edit the row."""
        name = request.path_params["column"]
        if name not in {*self._list_prop_names, *self._details_prop_names, *self._form_prop_names}.intersection(self._attached):
            raise HTTPException(404)
        row = await self.get_object_for_details(request)
        if row is None:
            raise HTTPException(404)
        if not (await self.check_can_view_details(request, row) or await self.check_can_edit(request, row)):
            raise HTTPException(403)
        return serve(await super().get_prop_value(row, name), request)

    async def _read_files(self, request: Request, row: Any) -> None:
        """Put a value that knows the present file in the place of each file of the form.

        sqladmin would take an attachment for a file of its own storage, and neither the form nor the field gets to see the row.
        """
        _editing.set(request)
        if request.method != "POST":
            return
        form = await request.form()
        names = [name for name in self._attached if name in self._form_prop_names]
        values: list[Any] = []
        for name in names:
            value = self._value_of(row, name)
            value.form = value.form.read(request, form, name)
            values.append((name, value))
        request._form = FormData([*((key, item) for key, item in form.multi_items() if key not in names), *values])

    def _value_of(self, row: Any, name: str) -> _Value:
        present, views = getattr(row, name, None), self._views(row, name, _editing.get())
        return _Value(present, FormFiles(views) if name in self._collections else FormFile(next(iter(views), None)))

    def _views(self, row: Any, name: str, request: Request | None) -> list[FileView]:
        value = getattr(row, name, None)
        files = value if isinstance(value, AttachmentList) else [] if value is None else [value]
        url = ""
        if request is not None and files and (self.can_view_details or self.can_edit):
            route = f"admin:view-{self.identity}-serve_attachment"
            url = str(request.url_for(route, column=name, pk=str(get_object_identifier(row))))
        return [FileView.of(file, url, self.attachment_previews.get(name)) for file in files]

    def _show(self, row: Any, name: str, shown: Any, request: Request | None) -> Any:
        if name not in self._attached:
            return shown
        return Markup("<br>").join(render_file(view) for view in self._views(row, name, request))

    @asynccontextmanager
    async def _stored_files(self, data: dict[str, Any]) -> AsyncIterator[dict[str, list[Attachment]]]:
        """Store the new files, and yield them by their fields; raise where one is refused, with the reason at its field."""
        new: dict[str, list[Attachment]] = {}
        stored: list[Attachment] = []
        problems: list[str] = []
        async with discarded_unless_assigned(stored):
            for key, value in data.items():
                if not isinstance(value, _Value):
                    continue
                new[key], attribute = [], getattr(self.model, key)
                try:
                    for upload in value.form.uploads:
                        new[key].append(await store(upload, attribute))
                        stored.append(new[key][-1])
                    if isinstance(value.form, FormFiles):
                        value.form.require_room(attribute, value.present, new[key])
                except ValueError as error:
                    problems.append(f"{key}: {error}")
                    if value.field is not None:
                        value.field.errors = [*value.field.errors, str(error)]
            if problems:
                raise ContentRejectedError(" ".join(problems))
            yield new

    async def _assign_collections(self, data: dict[str, Any], model: Any, is_created: bool, request: Request) -> None:
        for key in [name for name in self._collections if name in data]:
            given = data.pop(key)
            if is_created:
                setattr(model, key, given)
            else:
                _apply_at_commit(model, key, *given)
        await type(self).on_model_change(self, data, model, is_created, request)


def _inserted(value: _Value, new: list[Attachment]) -> Any:
    """Return the value of an attribute of a new row."""
    if isinstance(value.form, FormFiles):
        return [*value.form.copies(value.present or ()), *new]
    return next(iter(new), value.present if value.form.action is FileAction.KEEP else None)


def _apply_at_commit(row: Any, key: str, form: FormFiles, new: list[Attachment]) -> None:
    """Change the files of a row where its session may load them: in the thread of a synchronous one."""
    event.listen(object_session(row), "before_commit", lambda _: form.apply(getattr(row, key), new), once=True)
