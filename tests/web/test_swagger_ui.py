"""The forms that dependencies receive, tried in FastAPI's page of the API, in a browser."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from granite_storage.testing import BoundStorage, bound_storage
from tests.contrib.test_admin_pages import served
from tests.gallery.browser import INSTALLING, browser, page, programs
from tests.services import service
from tests.web.test_form_descriptions import Base, make_app

pytestmark = [
    pytest.mark.exhaustive("a browser takes longer than all the requests that it makes"),
    pytest.mark.timeout(INSTALLING + 120),
]


@pytest.fixture
async def kit() -> AsyncIterator[BoundStorage]:
    async with bound_storage(Base) as kit:
        yield kit


async def test_forms_are_tried(kit: BoundStorage, tmp_path: Path) -> None:
    pytest.importorskip("fastapi_offline", reason="the files of Swagger UI are not installed", exc_type=ImportError)
    app, paths = make_app(), [tmp_path / name for name in ("a.txt", "bc.txt")]
    app.mount("/static", StaticFiles(packages=[("fastapi_offline", "static")]))

    @app.get("/try", include_in_schema=False)
    async def show() -> HTMLResponse:
        files = {f"swagger_{name}_url": f"/static/swagger-ui{end}" for name, end in (("js", "-bundle.js"), ("css", ".css"))}
        return get_swagger_ui_html(openapi_url="/openapi.json", title="Try", swagger_favicon_url="data:,", **files)

    for path in paths:
        path.write_text(path.name)
    with contextlib.ExitStack() as stack:
        driver = stack.enter_context(browser(stack.enter_context(service("Chromium", programs()))))
        window = stack.enter_context(page(driver, stack.enter_context(served(app)), tmp_path))
        window.look(1280)

        def open_form(operation: str) -> str:
            window.open("/try")
            form = f"#operations-default-{operation}"
            for control in (".opblock-summary-control", ".try-out__btn"):
                window.run("arguments[0].click()", window.one(f"{form} {control}"))
            return form

        def execute(form: str) -> str:
            window.run("arguments[0].click()", window.one(f"{form} .execute"))
            assert window.one(f"{form} .live-responses-table .response-col_status").is_displayed()
            return "".join("".join(window.texts(f"{form} .live-responses-table .highlight-code code")).split())

        form = open_form("create_profiles_post")
        window.one(f"{form} tr[data-property-name=avatar] input[type=file]").send_keys(str(paths[0]))
        assert '"avatar":5,"title":"string","name":"string"' in execute(form)

        form = open_form("album_albums_post")
        photos = f"{form} tr[data-property-name=photos]"
        window.one(f"{photos} input[type=file]").send_keys(str(paths[0]))
        window.run("arguments[0].click()", window.one(f"{photos} .json-schema-form-item-add"))
        window.all(f"{photos} input[type=file]")[1].send_keys(str(paths[1]))
        assert "[5,6]" in execute(form)
