"""The admin panels in a browser: a file is created, seen, kept, replaced and cleared, and several are dragged into an order."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from selenium.webdriver import ActionChains
from sqladmin import Admin
from starlette.applications import Starlette
from starlette.types import ASGIApp
from starlette_admin.contrib import sqla

from granite_storage.contrib.sqladmin import AttachmentAdmin
from granite_storage.contrib.starlette_admin import AttachmentField, AttachmentPlugin
from tests.contrib.panels import Panel, User, database, names_of, picture
from tests.gallery.browser import INSTALLING, Page, browser, eventually, page, programs
from tests.services import service

pytestmark = [
    pytest.mark.exhaustive("a browser takes longer than all the requests that it makes"),
    pytest.mark.timeout(INSTALLING + 300),
    # starlette-admin reads a form once more to look for its token, and closes none of the files.
    pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.SpooledTemporaryFile:ResourceWarning"),
]


class UserAdmin(AttachmentAdmin, model=User):
    column_list = (User.name, User.avatar)


class UserView(sqla.ModelView):
    fields = ("id", "name", "avatar", AttachmentField(User.photos))


def sqladmin(engine: Any) -> ASGIApp:
    app = Starlette()
    Admin(app, engine).add_view(UserAdmin)
    return app


def starlette_admin(engine: Any) -> ASGIApp:
    app = Starlette()
    admin = sqla.Admin(engine, secret_key="secret", plugins=[AttachmentPlugin()])
    admin.add_view(UserView(User))
    admin.mount_to(app)
    return app


@contextlib.contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],), name="panel")
        thread.start()
        try:
            eventually(lambda: server.started or not thread.is_alive())
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.parametrize("panel", [sqladmin, starlette_admin])
async def test_files_of_a_row(panel: Any, kind: str, tmp_path: Path) -> None:
    paths = {}
    for name, colour in {"a": "red", "b": "green", "c": "blue", "d": "teal"}.items():
        paths[name] = tmp_path / f"{name}.png"
        paths[name].write_bytes(picture(colour))
    create, edit = ("/admin/user/create", "/admin/user/edit/1" if panel is sqladmin else "/admin/user/edit?pk=1")

    async with database(kind, tmp_path) as (engine, manager):
        with (
            service("Chromium", programs()) as found,
            browser(found) as driver,
            served(panel(engine)) as address,
            page(driver, address, tmp_path) as window,
        ):
            rows = Panel(None, engine, manager)  # type: ignore[arg-type]
            window.look(1280)

            def save() -> None:
                before = window.one("body")
                button = window.one("input[type=submit][value=Save], form button[type=submit]:not([name])")
                window.run("arguments[0].click()", button)
                eventually(lambda: window.run("return document.readyState") == "complete" and is_gone(before))

            window.open(create)
            window.one("[name=name]").send_keys("Ada")
            window.one("#avatar").send_keys(str(paths["d"]))
            window.one("#photos").send_keys("\n".join(str(paths[name]) for name in "abc"))
            save()
            [user] = await rows.check()
            assert (str(user.avatar), names_of(user)) == ("d.png", ["a.png", "b.png", "c.png"])
            eventually(lambda: shown_width(window, "img[src*='/avatar']") == 32)

            window.open(edit)
            eventually(lambda: shown_width(window, "img[src*='/photos']") == 32)
            window.one("[name=name]").send_keys(" Lovelace")
            save()
            [user] = await rows.check()
            assert (user.name, str(user.avatar), len(user.photos)) == ("Ada Lovelace", "d.png", 3)

            window.open(edit)
            window.one("#avatar").send_keys(str(paths["a"]))
            assert window.one("#avatar-replace").is_selected()
            drag_last_to_first(window)
            window.run("arguments[0].click()", window.one("[name=photos-removed][value='1']"))
            save()
            [user] = await rows.check()
            assert (str(user.avatar), names_of(user)) == ("a.png", ["c.png", "b.png"])

            window.open(edit)
            window.run("arguments[0].click()", window.one("#avatar-clear"))
            save()
            [user] = await rows.check()
            assert (user.avatar, names_of(user)) == (None, ["c.png", "b.png"])
    gc.collect()  # while the warning is ignored


def is_gone(element: Any) -> bool:
    try:
        element.is_enabled()
    except Exception:  # noqa: BLE001  # selenium's, of several kinds while a page is replaced
        return True
    return False


def shown_width(window: Page, selector: str) -> int:
    width: int = window.run("return document.querySelector(arguments[0])?.naturalWidth ?? 0", selector)
    return width


def drag_last_to_first(window: Page) -> None:
    rows = window.all("ol li[draggable]")
    window.run("arguments[0].scrollIntoView({block: 'center'})", rows[0])
    moves = ActionChains(window.driver).click_and_hold(rows[-1].find_element("css selector", "small"))
    moves.move_to_element(rows[1]).move_to_element_with_offset(rows[0], 0, -rows[0].size["height"] // 2 + 3)
    moves.move_by_offset(2, 0).release().perform()
    assert window.texts("ol li small") != []
