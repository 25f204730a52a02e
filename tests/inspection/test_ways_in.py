"""Whatever way a file comes in, the policy judges it before it is kept, and nothing of what is refused is left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from granite_storage import StoredObjectRef
from granite_storage.exceptions import (
    ContentError,
    ContentRejectedError,
    InfectedContentError,
    InfectedObjectError,
    ScannerUnavailableError,
    ScanPendingError,
    StorageError,
    UnsupportedContentError,
)
from granite_storage.inspection import ImageLimits
from granite_storage.signing import UrlSigner
from tests.inspection.support import (
    INFECTED,
    UNAVAILABLE,
    WAYS,
    Counted,
    File,
    Refused,
    ScriptedScanner,
    Shop,
    Way,
    make_shop,
    png,
)

Opening = Callable[..., Awaitable[Shop]]
PICTURE = File(png(text=b"x" * 3000))
STATUS: dict[type[StorageError], int] = {
    UnsupportedContentError: 415,
    ContentRejectedError: 422,
    InfectedContentError: 422,
    ScannerUnavailableError: 503,
}


@pytest.fixture
async def open_shop(tmp_path: Path) -> AsyncIterator[Opening]:
    async with AsyncExitStack() as stack:
        yield lambda **checks: stack.enter_async_context(make_shop(tmp_path, **checks))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


def all_checks(**other: Any) -> dict[str, Any]:
    return {
        "accept": ("image/*", "text/plain"),
        "inspect": [ImageLimits(max_pixels=1_000_000, max_side=2000)],
        "scanner": ScriptedScanner(),
        "validate": Counted(),
        **other,
    }


async def require_refused(shop: Shop, way: Way, file: File, error: type[StorageError], says: str) -> None:
    before = len(await shop.objects())
    with pytest.raises((error, Refused)) as caught:
        await way(shop, file)
    if isinstance(caught.value, Refused):
        assert caught.value.status == STATUS[error]
        assert says in caught.value.problem["detail"]
    # What a client has stored directly stays where no row refers to it, until its time is over.
    assert len(await shop.objects()) - before == (way is WAYS["upload_directly"])


async def test_what_is_accepted_is_kept_with_what_was_found(open_shop: Opening, way: Way) -> None:
    checks = all_checks()
    shop = await open_shop(**checks)
    ref = await way(shop, PICTURE)
    assert (ref.content_type, ref.original_filename, ref.size) == ("image/png", "a.png", len(PICTURE.content))
    assert ref.media == {"type": "image/png", "width": 3, "height": 2}
    assert ref.scan is not None
    assert (ref.scan["status"], ref.scan["by"]) == ("clean", "scripted 1")
    assert await shop.manager.get(ref) == PICTURE.content
    assert checks["scanner"].seen == [PICTURE.content]
    (shown,) = checks["validate"].shown
    assert (shown.filename, shown.content_type, shown.storage_key) == ("a.png", "image/png", "files")
    assert PICTURE.content.startswith(shown.head)


async def test_another_type_is_refused(open_shop: Opening, way: Way) -> None:
    shop = await open_shop(**all_checks())
    pdf = File(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "a.pdf", "application/pdf")
    await require_refused(shop, way, pdf, UnsupportedContentError, "application/pdf")


async def test_a_contradicted_type_is_refused(open_shop: Opening, way: Way) -> None:
    shop = await open_shop(**all_checks())
    await require_refused(shop, way, File(b"<html><script>", "a.png", "image/png"), UnsupportedContentError, "image/png")


async def test_a_contradicted_type_is_corrected(open_shop: Opening, way: Way) -> None:
    shop = await open_shop(**all_checks(on_mismatch="correct"))
    ref = await way(shop, replace(PICTURE, filename="a.jpg", content_type="image/jpeg"))
    assert (ref.content_type, ref.original_filename) == ("image/png", "a.jpg.png")


async def test_a_picture_that_is_too_large_is_refused(open_shop: Opening, way: Way) -> None:
    shop = await open_shop(**all_checks())
    await require_refused(shop, way, File(png(65_500, 65_500)), ContentRejectedError, "65500 x 65500")


async def test_the_application_refuses(open_shop: Opening, way: Way) -> None:
    shop = await open_shop(**all_checks())
    unwanted = replace(PICTURE, filename="unwanted.png")
    await require_refused(shop, way, unwanted, ContentRejectedError, "We do not want files of that name.")


async def test_what_is_infected_is_refused(open_shop: Opening, way: Way) -> None:
    shop = await open_shop(**all_checks())
    await require_refused(shop, way, File(INFECTED, "a.txt", "text/plain"), InfectedContentError, "virus scanner")
    await require_refused(shop, way, File(png(text=INFECTED)), InfectedContentError, "virus scanner")


async def test_an_absent_scanner_refuses(open_shop: Opening, way: Way) -> None:
    shop = await open_shop(**all_checks(scanner=ScriptedScanner(fails=UNAVAILABLE)))
    await require_refused(shop, way, PICTURE, ScannerUnavailableError, "could not be scanned")


async def test_an_absent_scanner_accepts(open_shop: Opening, way: Way) -> None:
    shop = await open_shop(**all_checks(scanner=ScriptedScanner("accept", fails=UNAVAILABLE)))
    ref = await way(shop, PICTURE)
    assert ref.scan is not None
    assert ref.scan["status"] == "failed"


@pytest.mark.parametrize("way", [WAYS["put_bytes"], WAYS["put_stream"]], ids=["put_bytes", "put_stream"])
async def test_an_absent_scanner_holds(open_shop: Opening, way: Way) -> None:
    scanner = ScriptedScanner(fails=UNAVAILABLE)
    shop = await open_shop(**all_checks(scanner=scanner))
    scanner.on_unavailable = "hold"  # a base without a journal could not be bound to it
    ref = await way(shop, PICTURE)
    assert ref.scan is not None
    assert ref.scan["status"] == "pending"
    assert await shop.manager.get(ref) == PICTURE.content


@pytest.mark.parametrize(("status", "error"), [("pending", ScanPendingError), ("infected", InfectedObjectError)])
async def test_no_url_of_what_is_not_clean(status: str, error: type[StorageError]) -> None:
    ref = StoredObjectRef("files", "memory", "x", 1, "", scan={"status": status})
    with pytest.raises(error):
        UrlSigner("http://test/files", keys={"1": "s" * 40}).sign(ref, expires_in=timedelta(hours=1))


def test_errors_are_of_the_content() -> None:
    assert all(issubclass(error, ContentError) for error in (UnsupportedContentError, ContentRejectedError, InfectedContentError))
