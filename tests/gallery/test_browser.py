"""The gallery as a visitor sees it, in a headless Chromium.

GALLERY_SCREENSHOTS names a folder for the pictures that `test_it_is_fit_to_be_seen` takes.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pillow_heif
import pytest
from PIL import Image
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.keys import Keys

from tests.gallery.browser import INSTALLING, Page, browser, eventually, page, programs, served
from tests.gallery.support import stored
from tests.services import service

pytestmark = pytest.mark.timeout(INSTALLING + 300)

MAX_SIZE = 3_000_000
DROP = """
const [files, enough] = arguments;
const transfer = new DataTransfer();
for (const [name, type, size] of files) transfer.items.add(new File([new Uint8Array(size).fill(65)], name, { type }));
for (const kind of enough ?? ["dragenter", "dragover", "drop"]) {
  const event = new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: transfer });
  document.getElementById("drop").dispatchEvent(event);
}
"""


@pytest.fixture(scope="session")
def driver(_temporary_folder: Path) -> Iterator[WebDriver]:
    """One browser for all tests: to start it takes longer than most of them."""
    with service("Chromium", programs()) as found, browser(found) as started:
        yield started


@pytest.fixture
def visit(driver: WebDriver, tmp_path: Path) -> Iterator[Page]:
    """The gallery, empty, in a window; whatever the browser complains of fails the test."""
    with served(tmp_path, MAX_SIZE=str(MAX_SIZE)) as address, page(driver, address, tmp_path) as opened:
        opened.look(1280)
        opened.open()
        eventually(lambda: opened.one("#empty").is_displayed())
        yield opened
        assert opened.complaints() == []


def png(width: int, height: int, colour: bytes = b"\xc3\xd4\x6b") -> bytes:
    """A picture of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" + colour * width) * height)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def chosen(visit: Page, *paths: Path, field: str = "#files") -> None:
    visit.one(field).send_keys("\n".join(map(str, paths)))


def names(visit: Page) -> list[str]:
    return visit.texts(".item h3")


def shown_width(visit: Page, selector: str) -> int:
    """The width of a picture that has been loaded."""
    width: int = eventually(lambda: visit.run("return document.querySelector(arguments[0])?.naturalWidth", selector))
    return width


def test_an_upload_shows_how_far_it_is(visit: Page, tmp_path: Path) -> None:
    content = b"%PDF-1.7\n" + os.urandom(2_000_000)
    (tmp_path / "report.pdf").write_bytes(content)
    visit.slow_down(1_000_000)
    chosen(visit, tmp_path / "report.pdf")
    seen: list[float] = []

    def arrived() -> bool:
        seen.extend(visit.run("return [...document.querySelectorAll('#uploads progress')].map((one) => one.value)"))
        return names(visit) == ["report.pdf"]

    eventually(arrived)
    assert seen == sorted(seen)
    assert len({value for value in seen if 0 < value < 1}) >= 3
    assert visit.all(".sending") == []
    assert visit.texts("#status") == ["report.pdf hangs on the wall."]
    assert list(stored(tmp_path).values()) == [content]
    assert visit.texts(".item .about") == ["application/pdf · 2 MB"]
    eventually(lambda: visit.one(".item .preview").text == "PDF")  # it fades in


def test_a_file_goes_straight_to_the_storage(visit: Page, tmp_path: Path) -> None:
    content = png(300, 200) + os.urandom(2_000_000)
    (tmp_path / "picture.png").write_bytes(content)
    visit.one("#direct").click()
    visit.slow_down(1_000_000)
    chosen(visit, tmp_path / "picture.png")
    seen: list[float] = []

    def arrived() -> bool:
        seen.extend(visit.run("return [...document.querySelectorAll('#uploads progress')].map((one) => one.value)"))
        return names(visit) == ["picture.png"]

    eventually(arrived)
    assert seen == sorted(seen)
    assert len({value for value in seen if 0 < value < 1}) >= 3
    visit.slow_down(-1)
    assert shown_width(visit, ".item img") == 300
    paths = [(status, path.split("/")[1:3]) for status, path in visit.answers() if path.startswith(("/direct", "/uploads"))]
    assert [(status, where[0]) for status, where in paths] == [(200, "direct"), (204, "uploads"), (201, "direct")]
    assert content in stored(tmp_path).values()


def test_a_file_that_is_sent_directly_is_what_it_says(visit: Page) -> None:
    visit.complaints_expected += ["413", "415"]
    visit.one("#direct").click()
    files = [("large.mkv", "video/x-matroska", 20_000_000), ("page.html", "text/html", 100), ("false.png", "image/png", 100)]
    visit.run(DROP, files)
    eventually(lambda: len(visit.all(".failed")) == 2)
    assert sorted(visit.texts(".failed .state")) == [
        "It is larger than 3 MB, the most that is taken here.",
        "The gallery takes pictures, films, sound, plain text, PDF and ZIP.",
    ]
    eventually(lambda: names(visit) == ["false.png.txt"])  # it is text, and says so now
    assert len([path for _, path in visit.answers() if path.startswith("/uploads")]) == 1


def test_several_files_are_dropped(visit: Page, tmp_path: Path) -> None:
    files = [(f"{number}.txt", "text/plain", 1000 + number) for number in range(5)]
    visit.run(DROP, files, ["dragenter", "dragover"])
    assert "over" in visit.one("#drop").get_attribute("class").split()
    visit.run(DROP, files, ["drop"])
    assert "over" not in visit.one("#drop").get_attribute("class").split()
    eventually(lambda: len(names(visit)) == 5)
    assert sorted(names(visit)) == [name for name, _, _ in files]
    assert sorted(map(len, stored(tmp_path).values())) == [size for _, _, size in files]
    eventually(lambda: visit.texts(".excerpt") == ["A" * 600] * 5)
    assert {status for status, path in visit.answers() if "/file" in path} == {206}
    visit.open()
    eventually(lambda: len(names(visit)) == 5)


def test_a_picture_is_looked_at(visit: Page, tmp_path: Path) -> None:
    """Its thumbnail is in the list, and a click shows itself."""
    (tmp_path / "lichen.png").write_bytes(png(2000, 1500))
    chosen(visit, tmp_path / "lichen.png")
    assert shown_width(visit, ".item img") == 480
    sizes = visit.run("return ['width', 'height'].map((name) => document.querySelector('.item img').getAttribute(name))")
    assert sizes == ["480", "360"]  # so that nothing jumps when it is loaded
    assert [path.split("?")[0] for _, path in visit.answers() if path.startswith("/items/")] == ["/items/1/thumb"]
    preview = visit.one(".item .preview")
    assert preview.accessible_name == "Look at lichen.png"
    preview.send_keys(Keys.ENTER)
    assert visit.one("#viewer").is_displayed()
    assert shown_width(visit, "#viewer img") == 2000
    assert visit.one("#viewer").accessible_name == "lichen.png"
    assert visit.texts("#viewer dd")[0] == "image/png"
    assert len(visit.texts("#viewer .checksum")[0]) == 64
    visit.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    eventually(lambda: not visit.one("#viewer").is_displayed())
    assert visit.driver.switch_to.active_element == preview


def test_a_smaller_copy_is_made_while_the_visitor_looks(visit: Page, tmp_path: Path) -> None:
    """The page says so, and shows the copy as soon as it is there; the next time it is there at once."""
    (tmp_path / "lichen.png").write_bytes(png(2000, 1500))
    chosen(visit, tmp_path / "lichen.png")
    eventually(lambda: names(visit) == ["lichen.png"])
    # The answer is held back until the test lets it go.
    visit.run(
        """
        const given = window.fetch;
        window.letGo = null;
        window.fetch = async (url, options) => {
          const answer = await given(url, options);
          if (String(url).endsWith("/preview")) await new Promise((resolve) => (window.letGo = resolve));
          return answer;
        };
        """
    )
    visit.one(".item .preview").click()
    eventually(lambda: visit.run("return window.letGo !== null"))
    assert visit.texts("#viewer .copy") == ["A smaller copy is being made…"]
    assert visit.all("#viewer .copy a") == []
    visit.run("window.letGo()")
    assert visit.one("#viewer .copy a").text.startswith("Smaller copy: 1600 × 1200, ")
    copied = """
      const [done] = arguments;
      fetch(document.querySelector(".copy a").href).then((one) => done([one.status, one.headers.get("content-type")]));
    """
    assert visit.waits_for(copied) == [200, "image/webp"]
    visit.one("#viewer button").click()

    visit.open()
    eventually(lambda: names(visit) == ["lichen.png"])
    visit.answers()
    visit.one(".item .preview").click()
    assert visit.one("#viewer .copy a").text.startswith("Smaller copy: 1600 × 1200, ")
    assert [path for _, path in visit.answers() if path.endswith("/preview")] == []
    assert len(stored(tmp_path)) == 3


def test_a_picture_that_no_browser_shows_is_looked_at(visit: Page, tmp_path: Path) -> None:
    """A TIFF is a download; its thumbnail stands for it, and then its preview."""
    Image.new("RGB", (1000, 500), "teal").save(tmp_path / "scan.tiff")
    chosen(visit, tmp_path / "scan.tiff")
    assert shown_width(visit, ".item img") == 480
    visit.one(".item .preview").click()
    eventually(lambda: shown_width(visit, "#viewer img") == 1000)


def test_a_picture_that_cannot_be_shown_is_refused_in_words(visit: Page, tmp_path: Path) -> None:
    visit.complaints_expected += ["422"]
    header = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(10)  # and no picture
    (tmp_path / "broken.webp").write_bytes(header)
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), "teal")).save(tmp_path / "phone.heic", quality=80)
    chosen(visit, tmp_path / "broken.webp", tmp_path / "phone.heic")
    eventually(lambda: len(visit.all(".failed")) == 2)
    heic, broken = sorted(visit.texts(".failed .state"))
    assert heic.startswith("The file is not an image of a supported type: JPEG, PNG,")
    assert broken == "The image is damaged and cannot be read."
    assert names(visit) == []
    assert stored(tmp_path) == {}


def test_a_thumbnail_that_is_gone_has_a_tile(visit: Page, tmp_path: Path) -> None:
    visit.complaints_expected += ["404"]
    headers = {"X-Gallery": "1", "Content-Type": "image/png"}
    assert httpx.post(f"{visit.address}/items?name=a.png", content=png(20, 10), headers=headers).status_code == 201
    for path in (tmp_path / "data" / "files" / "gallery").rglob("*-thumb.webp"):
        path.unlink()
    visit.open()
    assert eventually(lambda: visit.texts(".item .tile")) == ["png"]


@pytest.mark.time_bound
def test_a_film_plays_and_seeks_by_ranges(visit: Page, tmp_path: Path) -> None:
    """The samples are painted and filmed by the browser, and so is the film that is played here; a busy one films less."""
    visit.one("#samples").click()
    eventually(lambda: len(names(visit)) == 5)
    film = next(name for name in names(visit) if name.startswith("lichen."))
    visit.answers()
    next(one for one in visit.all(".preview") if one.accessible_name == f"Look at {film}").click()
    eventually(lambda: visit.run("return document.querySelector('#viewer video')?.readyState") or 0)
    sought = """
      const [share, done] = arguments;
      const film = document.querySelector("#viewer video");
      film.onseeked = () => done([film.currentTime, film.duration]);
      film.currentTime = share * film.duration;
    """
    for share in (0.8, 0.1):
        now, duration = visit.waits_for(sought, share)
        assert duration > 2
        assert now == pytest.approx(share * duration, abs=0.1)
    played = """
      const [done] = arguments;
      const film = document.querySelector("#viewer video");
      const begun = film.currentTime;
      film.muted = true;
      film.ontimeupdate = () => film.currentTime > begun + 0.5 && done(film.currentTime - begun);
      film.play().catch((error) => done(String(error)));
    """
    assert visit.waits_for(played) > 0.5
    # By and by a browser may ask for the rest of a film, but never for all of it at once.
    assert {status for status, path in visit.answers() if "/file" in path} == {206}


def test_a_file_is_replaced(visit: Page, tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(png(100, 100))
    (tmp_path / "new.png").write_bytes(png(200, 100))
    chosen(visit, tmp_path / "old.png")
    assert shown_width(visit, ".item img") == 100
    visit.one(".item .replace").click()
    chosen(visit, tmp_path / "new.png", field="#replacement")
    eventually(lambda: names(visit) == ["new.png"])
    assert shown_width(visit, ".item img") == 200
    original, thumb = stored(tmp_path).values()
    assert {original[:4], thumb[:4]} == {b"\x89PNG", b"RIFF"}
    visit.one(".item .delete").click()
    visit.one("#question [value=delete]").click()
    eventually(lambda: visit.one("#empty").is_displayed())
    assert stored(tmp_path) == {}


def test_a_file_is_deleted_when_that_is_meant(visit: Page, tmp_path: Path) -> None:
    visit.run(DROP, [("a.txt", "text/plain", 10), ("b.txt", "text/plain", 10)])
    eventually(lambda: len(names(visit)) == 2)
    first, second = names(visit)
    visit.one(".item .delete").click()
    assert visit.one("#question-text").text == f"Delete {first}?"
    assert visit.driver.switch_to.active_element.text == "Keep it"
    visit.driver.switch_to.active_element.send_keys(Keys.ENTER)
    eventually(lambda: not visit.one("#question").is_displayed())
    assert len(stored(tmp_path)) == len(names(visit)) == 2
    visit.one(".item .delete").click()
    visit.one("#question [value=delete]").click()
    eventually(lambda: names(visit) == [second])
    assert visit.texts("#status") == [f"{first} was deleted."]
    assert len(stored(tmp_path)) == 1
    visit.one(".item .delete").click()
    visit.one("#question [value=delete]").click()
    eventually(lambda: visit.one("#empty").is_displayed())
    assert stored(tmp_path) == {}


def test_a_refusal_is_told_in_words(visit: Page, tmp_path: Path) -> None:
    visit.complaints_expected += ["413", "415"]
    visit.run(DROP, [("large.mkv", "video/x-matroska", 20_000_000)])
    large = "It is larger than 3 MB, the most that is taken here."
    eventually(lambda: visit.texts(".failed .state") == [large])
    assert visit.texts("#status") == [f"large.mkv: {large}"]
    visit.run(DROP, [("page.html", "text/html", 100)])
    wrong = "The gallery takes pictures, films, sound, plain text, PDF and ZIP."
    eventually(lambda: visit.texts(".failed .state") == [large, wrong])
    assert {status for status, path in visit.answers() if path.startswith("/items?name")} == {413, 415}
    assert stored(tmp_path) == {}
    for button in visit.all(".failed button"):
        button.click()
    assert visit.all(".sending") == []


def test_an_upload_that_is_cancelled_leaves_nothing(visit: Page, tmp_path: Path) -> None:
    visit.slow_down(100_000)
    visit.run(DROP, [(f"{number}.txt", "text/plain", 1_000_000) for number in range(4)])
    eventually(lambda: any(0 < float(one.get_attribute("value")) < 1 for one in visit.all("#uploads progress")))
    for button in reversed(visit.all(".sending button")):  # the one that waits first
        button.click()
    eventually(lambda: len(visit.all(".failed")) == 4)
    assert set(visit.texts(".failed .state")) == {"Cancelled; nothing of it was kept.", "Cancelled before it began."}
    eventually(lambda: stored(tmp_path) == {})
    assert httpx.get(f"{visit.address}/items").json() == []


HOSTILE = {
    "<img src=x onerror='document.title=1'>.txt": "<img src=x onerror='document.title=1'>.txt",
    "</bdi><script>document.title=1</script>.txt": "script>.txt",
    "invoice\u202egnp.txt": "invoicegnp.txt",
}


def test_names_are_only_text(visit: Page) -> None:
    visit.run(DROP, [(name, "text/plain", 10) for name in HOSTILE])
    eventually(lambda: len(names(visit)) == 3)
    assert sorted(names(visit)) == sorted(HOSTILE.values())
    for preview in visit.all(".preview"):
        preview.click()
        assert visit.texts("#viewer h2")[0] in HOSTILE.values()
        visit.one("#viewer button").click()
    visit.one(".item .delete").click()
    assert visit.run("return document.querySelectorAll('.item img, .item script, dialog script, dialog img').length") == 0
    assert visit.driver.title == "Gallery · Granite Storage"
    assert visit.run("return document.querySelector('h3 bdi') !== null")


def test_what_a_rollback_did(visit: Page, tmp_path: Path) -> None:
    visit.open("/rollback")
    assert eventually(lambda: visit.texts(".moment h2")) == ["Now"]
    before = set(stored(tmp_path, "notes"))
    visit.one("#fail").click()
    eventually(lambda: visit.texts(".moment h2") == ["Before", "During", "After the rollback"])
    assert visit.texts("#outcome")[0].endswith("Rows and files are exactly what they were before.")
    assert "UNIQUE constraint failed: note.title" in visit.texts("#outcome")[0]
    assert visit.texts(".count") == ["2", "2", "2", "4", "2", "2"]
    assert set(stored(tmp_path, "notes")) == before
    endings = {f"…{name[28:]}" for name in before}
    assert {line.partition(",")[0].strip() for line in visit.texts(".undone .files li:not(.gone) .name")} == endings
    assert visit.texts(".undone .rows .back .badge") == ["back", "back"]

    visit.one("#commit").click()
    eventually(lambda: visit.texts(".moment h2") == ["Before", "During", "After the commit"])
    after = set(stored(tmp_path, "notes"))
    assert len(after) == 2
    assert not after & before
    shown = {line.partition(",")[0].strip() for line in visit.texts(".kept .files li:not(.gone) .name")}
    assert shown == {f"…{name[28:]}" for name in after}
    assert len(visit.all(".kept .files li.gone")) == 2


def test_it_is_used_without_a_mouse(visit: Page) -> None:
    reached = []
    for _ in range(7):
        ActionChains(visit.driver).send_keys(Keys.TAB).perform()
        reached.append(visit.driver.switch_to.active_element.accessible_name)
        ring = visit.run(
            "const one = document.activeElement; return getComputedStyle(one.id === 'files' ? one.labels[0] : one).outlineStyle"
        )
        assert ring == "solid", reached
    assert reached == [
        "Skip to the gallery",
        "Granite Storage",
        "Gallery",
        "What a rollback did",
        "choose files",
        "Send them straight to the storage",
        "Paint a few samples",
    ]
    visit.run(DROP, [("a.txt", "text/plain", 10)])
    eventually(lambda: names(visit) == ["a.txt"])
    controls = visit.all("button, a, input:not([hidden])")
    assert [one.get_attribute("outerHTML") for one in controls if one.is_displayed() and not one.accessible_name] == []


def wall(visit: Page) -> None:
    """Hang what there is to be seen."""
    visit.one("#samples").click()
    visit.run(DROP, [("plans for the summer.pdf", "application/pdf", 84_000)])
    eventually(lambda: len(names(visit)) == 6)
    visit.run("scrollTo(0, 0)")


TEXTS = [".about", ".sum", ".hint", ".action.download", ".action.delete", ".failed .state", "footer p", "label.button"]


def contrast(visit: Page, selector: str) -> float:
    """The ratio that WCAG 2 defines, of a text's colour to that of the nearest background that is not transparent."""
    found: float = visit.run(
        """
        const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
        const light = (colour) => {
          canvas.fillStyle = colour;
          canvas.fillRect(0, 0, 1, 1);
          const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((one) => one / 255)
            .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const one = document.querySelector(arguments[0]);
        let behind = one;
        while (behind && /, 0\\)$|transparent/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
        const shades = [light(getComputedStyle(one).color), light(getComputedStyle(behind).backgroundColor)];
        const [low, high] = shades.sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
        """,
        selector,
    )
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_is_fit_to_be_seen(visit: Page, dark: bool) -> None:
    visit.complaints_expected += ["415"]
    wall(visit)
    visit.run(DROP, [("page.html", "text/html", 100)])
    eventually(lambda: visit.all(".failed"))
    sizes: dict[int, Any] = {}
    for width in (1280, 768, 390, 320):
        visit.look(width, dark=dark, still=True)
        eventually(lambda width=width: visit.run("return innerWidth") == width)
        assert visit.run("return document.documentElement.scrollWidth") <= width
        sizes[width] = visit.shoot(f"gallery-{width}-{'dark' if dark else 'light'}").stat().st_size
        assert sizes[width] > 20_000
    for selector in (
        ".about",
        ".sum",
        ".hint",
        ".action.download",
        ".action.delete",
        ".failed .state",
        "footer p",
        "label.button",
    ):
        assert contrast(visit, selector) >= 4.5, selector
    background = visit.run("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(23, 24, 26)") == dark
    assert visit.run("return getComputedStyle(document.querySelector('.item')).animationName") == "none"

    visit.open("/rollback")
    for button in ("#fail", "#commit"):
        visit.one(button).click()
        eventually(lambda button=button: visit.all(f".moment.{'undone' if button == '#fail' else 'kept'}"))
        for width in (1280, 390):
            visit.look(width, dark=dark, still=True)
            visit.shoot(f"rollback-{button[1:]}-{width}-{'dark' if dark else 'light'}")
            assert visit.run("return document.documentElement.scrollWidth") <= width
        for selector in (".new .badge", ".gone .badge", ".gone .name", ".outcome", ".moment .hint"):
            assert contrast(visit, selector) >= 4.5, selector
