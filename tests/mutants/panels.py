"""Mutants of the adapters of admin panels."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

MUTANTS = [
    Mutant(
        name="panels-refused-form-stays",
        rule="What a form has stored is deleted where its row is not committed.",
        path="granite_storage/contrib/_panels.py",
        old="        await discard(stored, cancelled=cancelled)",
        new="        await discard([], cancelled=cancelled)",
        tests=(
            "tests/contrib/test_panels.py::TestCollections::test_one_that_is_refused",
            "tests/contrib/test_starlette_admin.py::test_other_field_that_is_refused",
        ),
    ),
    Mutant(
        name="panels-file-wins-over-choice",
        rule="A file that contradicts the choice is refused.",
        path="granite_storage/contrib/_panels.py",
        old="        if self.action is not FileAction.REPLACE and self.uploads:",
        new="        if self.action is FileAction.REPLACE and not self.uploads:",
        tests=("tests/contrib/test_panels.py::TestForms::test_contradicting_choice",),
    ),
    Mutant(
        name="panels-first-of-two-choices",
        rule="A form that makes two choices for one file is refused.",
        path="granite_storage/contrib/_panels.py",
        old="next((one for one in FileAction if asked == [one.value]), None)",
        new="next((one for one in FileAction if asked[0] == one.value), None)",
        tests=("tests/contrib/test_panels.py::TestForms::test_choice_that_is_none",),
    ),
    Mutant(
        name="panels-asyncpg-errors-unknown",
        rule="What a driver refuses is known by its SQLSTATE, where its class tells nothing.",
        path="granite_storage/contrib/_panels.py",
        old='[:2] in ("22", "23")',
        new='[:2] in ("23",)',
        tests=("tests/contrib/test_panels.py::test_what_other_databases_refuse",),
    ),
    Mutant(
        name="panels-refusal-of-any-error",
        rule="An error of the application itself is not shown in the form.",
        path="granite_storage/contrib/_panels.py",
        old="    except (StatementError, OverflowError, UnicodeEncodeError) as error:\n",
        new="    except Exception as error:\n",
        tests=("tests/contrib/test_starlette_admin.py::TestHooks::test_error_of_another_kind",),
    ),
    Mutant(
        name="panels-starlette-refusals-of-owners-only",
        rule="What the database refuses of a row within the form of another is said in that form, too.",
        path="granite_storage/contrib/starlette_admin.py",
        old="            for one in (view, *view._inline_instances):",
        new="            for one in (view,):",
        tests=("tests/contrib/test_starlette_admin.py::TestInlineRows::test_row_that_the_database_refuses",),
    ),
    Mutant(
        name="panels-clear-of-required",
        rule="A required file cannot be cleared.",
        path="granite_storage/contrib/_panels.py",
        old="        if required and (self.action is FileAction.CLEAR or (",
        new="        if required and ((",
        tests=("tests/contrib/test_panels.py::TestForms::test_required_file",),
    ),
    Mutant(
        name="panels-empty-input-replaces",
        rule="A file input that was left empty is no file.",
        path="granite_storage/contrib/_panels.py",
        old="    return [item for item in uploads if item.filename or item.size]",
        new="    return uploads",
        tests=("tests/contrib/test_panels.py::TestForms::test_create_without_files",),
    ),
    Mutant(
        name="panels-collection-over-its-limit",
        rule="A collection over its limit is refused while the form can be shown again.",
        path="granite_storage/contrib/_panels.py",
        old="            cast(Any, declared_collection(attribute)).require(",
        new="            cast(Any, declared_collection(attribute)).require(0 *",
        tests=("tests/contrib/test_panels.py::TestCollections::test_too_many",),
    ),
    Mutant(
        name="panels-sqladmin-file-for-anybody",
        rule="sqladmin serves a file to those who may see or edit the row.",
        path="granite_storage/contrib/sqladmin.py",
        old="        if not (await self.check_can_view_details(request, row) or await self.check_can_edit(request, row)):\n"
        "            raise HTTPException(403)\n",
        new="",
        tests=("tests/contrib/test_panels.py::TestServing::test_permissions_of_the_view",),
    ),
    Mutant(
        name="panels-sqladmin-any-attribute",
        rule="sqladmin serves attachments that the view shows, and nothing else.",
        path="granite_storage/contrib/sqladmin.py",
        old="            row = await self.get_object_for_details(request) if name in shown else None",
        new="            row = await self.get_object_for_details(request)",
        tests=("tests/contrib/test_sqladmin.py::test_hidden_attribute",),
    ),
    Mutant(
        name="panels-sqladmin-hook-not-called",
        rule="A hook of the application is called.",
        path="granite_storage/contrib/sqladmin.py",
        old="        await type(self).on_model_change(self, data, model, is_created, request)\n",
        new="",
        tests=("tests/contrib/test_sqladmin.py::test_hook_of_the_application",),
    ),
    Mutant(
        name="panels-sqladmin-keep-clears",
        rule="An edit that keeps a file does not touch the attribute.",
        path="granite_storage/contrib/sqladmin.py",
        old="                    elif is_new or form.action is not FileAction.KEEP:",
        new="                    else:",
        tests=("tests/contrib/test_sqladmin.py::test_kept_file_is_not_written",),
    ),
    Mutant(
        name="panels-starlette-file-for-anybody",
        rule="starlette-admin serves a file to those who may see or edit the row.",
        path="granite_storage/contrib/starlette_admin.py",
        old="        if not actions:\n            raise HTTPException(403)\n",
        new="        actions = actions or [RequestAction.LIST]\n",
        tests=("tests/contrib/test_panels.py::TestServing::test_permissions_of_the_view",),
    ),
    Mutant(
        name="panels-starlette-any-attribute",
        rule="starlette-admin serves attachments that the view shows, and nothing else.",
        path="granite_storage/contrib/starlette_admin.py",
        old="            row = await view.find_by_pk(request, pk) if is_shown else None",
        new="            row = await view.find_by_pk(request, pk)",
        tests=("tests/contrib/test_starlette_admin.py::test_hidden_attribute",),
    ),
]
