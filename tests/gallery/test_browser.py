"""The gallery in a headless Chromium.

GALLERY_SCREENSHOTS names a folder for the pictures that `test_it_is_fit_to_be_seen` takes.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pillow_heif
import pytest
from PIL import Image
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.keys import Keys

from tests.gallery.browser import INSTALLING, Page, browser, eventually, page, programs, served
from tests.gallery.conftest import TOKENS
from tests.gallery.support import stored
from tests.services import service

pytestmark = pytest.mark.timeout(INSTALLING + 300)

MAX_SIZE = 3_000_000
DROP = """
const [files, kinds] = arguments;
const transfer = new DataTransfer();
for (const [name, type, size] of files) transfer.items.add(new File([new Uint8Array(size).fill(65)], name, { type }));
for (const kind of kinds ?? ["dragenter", "dragover", "drop"]) {
  const event = new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: transfer });
  document.querySelector(".drop").dispatchEvent(event);
}
"""


@pytest.fixture(scope="session")
def driver(_temporary_folder: Path) -> Iterator[WebDriver]:
    """One browser for all tests: to start it takes longer than most of them."""
    with service("Chromium", programs()) as found, browser(found) as started:
        yield started


@pytest.fixture
def visit(driver: WebDriver, tmp_path: Path) -> Iterator[Page]:
    """The gallery with an empty album of Anna, who has signed in; whatever the browser complains of fails the test."""
    with served(tmp_path, MAX_SIZE=str(MAX_SIZE)) as address, page(driver, address, tmp_path) as opened:
        opened.look(1280)
        sign_in(opened, "Anna")
        eventually(lambda: opened.one(".album > .empty").is_displayed())
        yield opened
        assert opened.complaints() == []


def sign_in(visit: Page, user: str) -> None:
    """Follow the link that the gallery prints."""
    visit.driver.get("about:blank")  # so that the page is loaded, and not only another place in it
    visit.open(f"/#sign-in={TOKENS[user]}")
    eventually(lambda: visit.texts("#user") == [f"Signed in as {user}"])


def png(width: int, height: int, colour: bytes = b"\xc3\xd4\x6b") -> bytes:
    """A picture of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" + colour * width) * height)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def chosen(visit: Page, *paths: Path, field: str = ".files") -> None:
    visit.one(field).send_keys("\n".join(map(str, paths)))


def names(visit: Page) -> list[str]:
    return visit.texts(".item h4")


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
        seen.extend(visit.run("return [...document.querySelectorAll('.uploads progress')].map((one) => one.value)"))
        return names(visit) == ["report.pdf"]

    eventually(arrived)
    assert seen == sorted(seen)
    assert len({value for value in seen if 0 < value < 1}) >= 3
    assert visit.all(".sending") == []
    assert visit.texts("#status") == ["report.pdf is stored."]
    assert list(stored(tmp_path).values()) == [content]
    assert visit.texts(".item .about") == ["application/pdf · 2 MB"]
    eventually(lambda: visit.one(".item .preview").text == "PDF")  # it fades in


def test_a_file_goes_straight_to_the_storage(visit: Page, tmp_path: Path) -> None:
    content = png(300, 200) + os.urandom(2_000_000)
    (tmp_path / "picture.png").write_bytes(content)
    visit.one(".direct").click()
    visit.slow_down(1_000_000)
    chosen(visit, tmp_path / "picture.png")
    seen: list[float] = []

    def arrived() -> bool:
        seen.extend(visit.run("return [...document.querySelectorAll('.uploads progress')].map((one) => one.value)"))
        return names(visit) == ["picture.png"]

    eventually(arrived)
    assert seen == sorted(seen)
    assert len({value for value in seen if 0 < value < 1}) >= 3
    visit.slow_down(-1)
    assert shown_width(visit, ".item img") == 300
    paths = [(status, path) for status, path in visit.answers() if "/direct/" in path or path.startswith("/uploads")]
    assert [(status, path.rpartition("/")[2]) for status, path in paths if "/direct/" in path] == [
        (200, "begin"),
        (201, "finish"),
    ]
    assert [status for status, path in paths if path.startswith("/uploads")] == [204]
    assert content in stored(tmp_path).values()


def test_a_file_that_is_sent_directly_is_what_it_says(visit: Page) -> None:
    visit.complaints_expected += ["413", "415"]
    visit.one(".direct").click()
    files = [("large.mkv", "video/x-matroska", 20_000_000), ("page.html", "text/html", 100), ("false.png", "image/png", 100)]
    visit.run(DROP, files)
    eventually(lambda: len(visit.all(".failed")) == 2)
    assert sorted(visit.texts(".failed .state")) == [
        "It is larger than 3 MB, the limit of the gallery.",
        "The gallery takes pictures, films, sound, plain text, PDF and ZIP.",
    ]
    eventually(lambda: names(visit) == ["false.png.txt"])  # it is text, and says so now
    assert len([path for _, path in visit.answers() if path.startswith("/uploads")]) == 1


def test_several_files_are_dropped(visit: Page, tmp_path: Path) -> None:
    files = [(f"{number}.txt", "text/plain", 1000 + number) for number in range(5)]
    visit.run(DROP, files, ["dragenter", "dragover"])
    assert "over" in visit.one(".drop").get_attribute("class").split()
    visit.run(DROP, files, ["drop"])
    assert "over" not in visit.one(".drop").get_attribute("class").split()
    eventually(lambda: len(names(visit)) == 5)
    assert sorted(names(visit)) == [name for name, _, _ in files]
    assert sorted(map(len, stored(tmp_path).values())) == [size for _, _, size in files]
    eventually(lambda: visit.texts(".excerpt") == ["A" * 600] * 5)
    assert {status for status, path in visit.answers() if "/files/" in path} == {206}
    visit.open()
    eventually(lambda: len(names(visit)) == 5)


def test_a_picture_is_looked_at(visit: Page, tmp_path: Path) -> None:
    """Its thumbnail is in the list, a click shows the original, and its large copy appears as soon as the worker has made it."""
    (tmp_path / "lichen.png").write_bytes(png(2000, 1500))
    visit.run(
        """
        window.told = new Set();
        new MutationObserver(() => {
          for (const line of document.querySelectorAll(".copy")) window.told.add(line.textContent);
        }).observe(document, { childList: true, subtree: true });
        """
    )
    chosen(visit, tmp_path / "lichen.png")
    assert shown_width(visit, ".item img") == 480
    sizes = visit.run("return ['width', 'height'].map((name) => document.querySelector('.item img').getAttribute(name))")
    assert sizes == ["480", "360"]  # so that nothing jumps when it is loaded
    preview = visit.one(".item .preview")
    assert preview.accessible_name == "Look at lichen.png"
    visit.one(".item .copy a")
    told = visit.run("return [...window.told]")
    assert told[0] == "A large copy is being made…"
    assert told[-1].startswith("Large copy: 1600 × 1200, ")
    assert not visit.all(".copy.waiting")
    seen = "return document.querySelector('.item img')?.currentSrc"
    eventually(lambda: "/large?" in (visit.run(seen) or ""))  # the first picture of an album is large
    copied = """
      const [done] = arguments;
      fetch(document.querySelector(".copy a").href).then((one) => done([one.status, one.headers.get("content-type")]));
    """
    assert visit.waits_for(copied) == [200, "image/webp"]

    preview = visit.one(".item .preview")
    preview.send_keys(Keys.ENTER)
    assert visit.one("#viewer").is_displayed()
    assert shown_width(visit, "#viewer img") == 2000
    assert visit.one("#viewer").accessible_name == "lichen.png"
    assert visit.texts("#viewer dd")[0] == "image/png"
    assert len(visit.texts("#viewer .checksum")[0]) == 64
    visit.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    eventually(lambda: not visit.one("#viewer").is_displayed())
    assert visit.driver.switch_to.active_element == preview

    visit.open()
    eventually(lambda: visit.one(".item .copy a").text.startswith("Large copy: 1600 × 1200, "))
    assert len(stored(tmp_path)) == 3


def test_a_picture_that_no_browser_shows_is_looked_at(visit: Page, tmp_path: Path) -> None:
    """A TIFF is a download; its copies stand for it."""
    Image.new("RGB", (1000, 500), "teal").save(tmp_path / "scan.tiff")
    chosen(visit, tmp_path / "scan.tiff")
    visit.one(".item .copy a")
    visit.one(".item .preview").click()
    assert shown_width(visit, "#viewer img") == 1000


def test_a_picture_that_cannot_be_shown_is_refused_in_words(visit: Page, tmp_path: Path) -> None:
    visit.complaints_expected += ["422"]
    header = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(10)  # and no picture
    (tmp_path / "broken.webp").write_bytes(header)
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), "teal")).save(tmp_path / "phone.heic", quality=80)
    chosen(visit, tmp_path / "broken.webp", tmp_path / "phone.heic")
    eventually(lambda: len(visit.all(".failed")) == 2)
    heic, broken = sorted(visit.texts(".failed .state"))
    assert heic.startswith("The file is not an image of a supported type: JPEG, PNG,")
    assert broken == "The image is damaged: it has no picture."
    assert names(visit) == []
    assert stored(tmp_path) == {}


def test_a_thumbnail_that_is_gone_has_a_tile(visit: Page, tmp_path: Path) -> None:
    visit.complaints_expected += ["404"]
    with httpx.Client(
        base_url=visit.address, cookies={"gallery_token": TOKENS["Anna"]}, headers={"X-Gallery": "1", "Content-Type": "image/png"}
    ) as client:
        assert client.post("/albums/1/files?name=a.png", content=png(20, 10)).status_code == 201
    for path in (tmp_path / "data" / "files" / "gallery").rglob("*-thumb.webp"):
        path.unlink()
    visit.open()
    assert eventually(lambda: visit.texts(".item .tile")) == ["png"]


@pytest.mark.time_bound
def test_a_film_plays_and_seeks_by_ranges(visit: Page, tmp_path: Path) -> None:
    """The samples are painted and filmed by the browser, and so is the film that is played here; a busy one films less."""
    visit.one(".samples").click()
    eventually(lambda: len(names(visit)) == 5 and len(visit.all(".copy a")) == 3)
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
    assert {status for status, path in visit.answers() if "/files/" in path and not path.endswith("/state")} == {206}


def test_a_file_is_replaced(visit: Page, tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(png(100, 100))
    (tmp_path / "new.png").write_bytes(png(200, 100))
    chosen(visit, tmp_path / "old.png")
    assert shown_width(visit, ".item img") == 100
    visit.one(".item .copy a")  # then the page does not change by itself any more
    visit.one(".item .replace").click()
    chosen(visit, tmp_path / "new.png", field="#replacement")
    eventually(lambda: names(visit) == ["new.png"])
    assert shown_width(visit, ".item img") == 200
    visit.one(".item .copy a")
    eventually(lambda: sorted(content[:4] for content in stored(tmp_path).values()) == [b"RIFF", b"RIFF", b"\x89PNG"])
    visit.one(".item .delete").click()
    visit.one("#question [value=delete]").click()
    eventually(lambda: visit.one(".album > .empty").is_displayed())
    eventually(lambda: stored(tmp_path) == {})


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
    visit.one(".item .delete").click()
    visit.one("#question [value=delete]").click()
    eventually(lambda: visit.one(".album > .empty").is_displayed())
    eventually(lambda: stored(tmp_path) == {})


def test_a_refusal_is_told_in_words(visit: Page, tmp_path: Path) -> None:
    visit.complaints_expected += ["413", "415"]
    visit.run(DROP, [("large.mkv", "video/x-matroska", 20_000_000)])
    large = "It is larger than 3 MB, the limit of the gallery."
    eventually(lambda: visit.texts(".failed .state") == [large])
    assert visit.texts("#status") == [f"large.mkv: {large}"]
    visit.run(DROP, [("page.html", "text/html", 100)])
    wrong = "The gallery takes pictures, films, sound, plain text, PDF and ZIP."
    eventually(lambda: visit.texts(".failed .state") == [large, wrong])
    assert {status for status, path in visit.answers() if "/files?name" in path} == {413, 415}
    assert stored(tmp_path) == {}
    for button in visit.all(".failed button"):
        button.click()
    assert visit.all(".sending") == []


def test_an_upload_that_is_cancelled_leaves_nothing(visit: Page, tmp_path: Path) -> None:
    visit.slow_down(100_000)
    visit.run(DROP, [(f"{number}.txt", "text/plain", 1_000_000) for number in range(4)])
    eventually(lambda: any(0 < float(one.get_attribute("value")) < 1 for one in visit.all(".uploads progress")))
    for button in reversed(visit.all(".sending button")):  # the one that waits first
        button.click()
    eventually(lambda: len(visit.all(".failed")) == 4)
    assert set(visit.texts(".failed .state")) == {"Cancelled; nothing of it was kept.", "Cancelled before it began."}
    eventually(lambda: stored(tmp_path) == {})
    assert names(visit) == []


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
    assert visit.run("return document.querySelector('h4 bdi') !== null")


def marks(visit: Page) -> dict[str, list[str]]:
    """What the table shows: for each file its state at each moment."""
    found: dict[str, list[str]] = visit.run(
        """
        return Object.fromEntries([...document.querySelectorAll("#moments tr")].map((line) => [
          line.querySelector("th").title,
          [...line.querySelectorAll(".mark")].map((mark) => mark.classList[1] ?? ""),
        ]));
        """
    )
    return found


def run(visit: Page, button: str) -> None:
    """Run the transaction, and wait for the end that the page shows."""
    visit.one(f"#{button}").click()
    eventually(lambda: visit.all(f".outcome.{'failed' if button == 'fail' else 'kept'}") and visit.all(f"#{button}:enabled"))


@pytest.mark.time_bound  # a rollback deletes at once, unless others lock the database for a second
def test_a_rollback_is_on_the_first_screen(visit: Page, tmp_path: Path) -> None:
    bottom = "return document.querySelector(arguments[0]).getBoundingClientRect().bottom"
    for shown in ("[data-code=rollback]", "#fail", "#commit", "#outcome"):
        assert visit.run(bottom, shown) < 900, shown
    before = stored(tmp_path, "notes")
    assert marks(visit) == {name: ["both", "", "", ""] for name in before}

    run(visit, "fail")
    seen = marks(visit)
    new = set(seen) - set(before)
    assert {name: seen[name] for name in before} == {name: ["both", "file", "both", "both"] for name in before}
    assert {(seen[name][0], seen[name][3]) for name in new} == {("none", "none")}
    assert [seen[name][1] for name in new].count("both") == 2
    assert stored(tmp_path, "notes") == before
    [outcome] = visit.texts("#outcome")
    assert outcome.startswith("The database refused a row (UNIQUE constraint failed: note.title). The new files were deleted ")
    assert outcome.endswith("Rows and files are exactly those from before.")
    assert visit.texts("#ended") == ["At the rollback"]

    run(visit, "commit")
    seen = marks(visit)
    new = set(seen) - set(before)
    assert {name: seen[name] for name in new} == {name: ["none", "both", "both", "both"] for name in new}
    assert {(*seen[name][:2], seen[name][3]) for name in before} == {("both", "file", "none")}
    assert set(stored(tmp_path, "notes")) == new
    assert visit.texts("#ended") == ["At the commit"]


def test_users_see_their_own_albums_and_public_ones(visit: Page) -> None:
    def albums() -> list[str]:
        return visit.texts(".album h3")

    visit.run(DROP, [("a.txt", "text/plain", 10)])
    eventually(lambda: names(visit) == ["a.txt"])
    visit.one("#title").send_keys("Norway", Keys.ENTER)
    eventually(lambda: albums() == ["Norway", "Anna’s pictures"])
    assert "sign-in" not in visit.driver.current_url
    visit.all(".public")[1].click()
    eventually(lambda: [path for _, path in visit.answers() if "is_public=true" in path])

    visit.one("#sign-out").click()
    eventually(lambda: visit.texts("#user") == ["To upload, sign in with a link that the gallery printed."])
    eventually(lambda: albums() == ["Anna’s pictures"])
    assert visit.texts(".album > .about") == ["An album of Anna"]
    assert names(visit) == ["a.txt"]
    assert visit.texts(".action") == ["Download"]
    assert [one.is_displayed() for one in visit.all("#new-album, .drop")] == [False]

    visit.complaints_expected += ["403"]
    visit.open("/#sign-in=an-old-token")  # in the page that is open
    old = "The link is an old one: the gallery prints new links when it starts."
    eventually(lambda: visit.texts("#status") == [old])
    visit.open(f"/#sign-in={TOKENS['Ben']}")
    eventually(lambda: visit.texts("#user") == ["Signed in as Ben"])
    eventually(lambda: albums() == ["Ben’s pictures", "Anna’s pictures"])
    assert len(visit.all(".drop")) == 1
    visit.one(".album .actions .delete").click()
    visit.one("#question [value=delete]").click()
    eventually(lambda: albums() == ["Anna’s pictures"])


def test_a_file_is_put_first(visit: Page) -> None:
    for name in ("a.txt", "b.txt"):
        visit.run(DROP, [(name, "text/plain", 10)])
        eventually(lambda name=name: name in names(visit))
    assert names(visit) == ["a.txt", "b.txt"]
    assert [one.is_displayed() for one in visit.all(".first")] == [False, True]
    visit.all(".first")[1].click()
    eventually(lambda: names(visit) == ["b.txt", "a.txt"])
    visit.open()
    eventually(lambda: names(visit) == ["b.txt", "a.txt"])


def test_it_is_used_without_a_mouse(visit: Page) -> None:
    reached = []
    for _ in range(14):
        ActionChains(visit.driver).send_keys(Keys.TAB).perform()
        reached.append(visit.driver.switch_to.active_element.accessible_name)
        ring = visit.run(
            "const one = document.activeElement;"
            "return getComputedStyle(one.classList.contains('files') ? one.labels[0] : one).outlineStyle"
        )
        assert ring == "solid", reached
    assert reached == [
        "Skip to the albums",
        "Granite Storage",
        "Sign out",
        "Code",  # which scrolls
        "Run it, and let it fail",
        "Run it, and commit",
        "Title of a new album",
        "Add album",
        "Everybody may see it",
        "Delete album",
        "choose files",
        "Send them straight to the storage",
        "Paint a few samples",
        "Several files in one column",
    ]
    visit.run(DROP, [("a.txt", "text/plain", 10)])
    eventually(lambda: names(visit) == ["a.txt"])
    controls = visit.all("button, a, input:not([hidden])")
    assert [one.get_attribute("outerHTML") for one in controls if one.is_displayed() and not one.accessible_name] == []


def fill(visit: Page) -> None:
    """Upload what there is to be seen."""
    visit.one(".samples").click()
    visit.run(DROP, [("plans for the summer.pdf", "application/pdf", 84_000)])
    eventually(lambda: len(names(visit)) == 6 and len(visit.all(".copy a")) == 3)
    visit.run("scrollTo(0, 0)")


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
    fill(visit)
    visit.run(DROP, [("page.html", "text/html", 100)])
    eventually(lambda: visit.all(".failed"))
    for button in ("fail", "commit"):
        run(visit, button)
        for width in (1280, 390) if button == "fail" else (1280, 768, 390, 320):
            visit.look(width, dark=dark, still=True)
            eventually(lambda width=width: visit.run("return innerWidth") == width)
            assert visit.run("return document.documentElement.scrollWidth") <= width
            shot = visit.shoot(f"{button}-{width}-{'dark' if dark else 'light'}")
            assert shot.stat().st_size > 20_000
        for selector in (".outcome", ".legend", "tbody th", "thead th"):
            assert contrast(visit, selector) >= 4.5, selector
    for selector in (
        ".about",
        ".copy a",
        ".hint",
        ".action.download",
        ".action.delete",
        ".failed .state",
        ".cause pre",
        "summary",
        "footer p",
        ".drop label",
    ):
        assert contrast(visit, selector) >= 4.5, selector
    background = visit.run("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(23, 24, 26)") == dark
    assert visit.run("return getComputedStyle(document.querySelector('.item')).animationName") == "none"
