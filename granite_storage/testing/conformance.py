"""The public conformance suite: tests of the guarantees of every backend, to subclass."""

from __future__ import annotations

from granite_storage.testing._cases.aborting import AbortCases
from granite_storage.testing._cases.copying import CopyCases
from granite_storage.testing._cases.delete import DeleteCases
from granite_storage.testing._cases.faults import FaultCases
from granite_storage.testing._cases.lifecycle import LifecycleCases
from granite_storage.testing._cases.listing import ListCases
from granite_storage.testing._cases.places import StoreCases
from granite_storage.testing._cases.placing import LocationCases
from granite_storage.testing._cases.read import ReadCases
from granite_storage.testing._cases.signing import SignCases
from granite_storage.testing._cases.write import WriteCases

__all__ = ["BackendConformance"]


class BackendConformance(
    WriteCases,
    ReadCases,
    ListCases,
    DeleteCases,
    CopyCases,
    SignCases,
    AbortCases,
    LocationCases,
    StoreCases,
    FaultCases,
    LifecycleCases,
):
    """The tests that every backend must pass: subclass it, and give it a backend.

    ```python
    class TestMyBackend(BackendConformance):
        supports_copy = True
        has_pages = can_be_full = can_refuse = can_be_unreachable = False
        can_lose_answers = is_shared = counts_unfinished = False

        @pytest.fixture
        async def backend(self, tmp_path):
            backend = MyBackend(tmp_path / "store")
            yield backend
            await backend.aclose()
    ```

    The fixture yields a fresh, empty backend for each test. The tests are coroutines: with pytest-asyncio set
    `asyncio_mode = "auto"`, or mark the class with `pytest.mark.asyncio`; with anyio mark it with `pytest.mark.anyio`.

    What cannot be known is declared. An ability that is not declared must really not be there: a test asserts it. Those of the
    second group below, which say something of the store, may be left undeclared: then their cases run where the backend has
    them. A fault that needs rigging has a hook to override; where there is none, its ability has to be declared off, so nothing
    is left out by oversight.

    Attributes:
        supports_copy: It satisfies `SupportsCopy`. Off unless declared, like the next five.
        supports_batch_delete: It satisfies `SupportsBatchDelete`.
        supports_cleanup: It satisfies `SupportsCleanup`.
        supports_abort: It satisfies `SupportsAbort`.
        supports_presign: It satisfies `SupportsPresign`.
        supports_presigned_upload: It satisfies `SupportsPresignedUpload`, for a range of sizes.
        supports_batch_presign: It satisfies `SupportsBatchPresign`. None unless declared, like the next five: either may be the
            case.
        supports_clock: It satisfies `SupportsClock`.
        supports_extra_keys: It satisfies `SupportsExtraKeys`.
        supports_mount_check: It satisfies `SupportsMountCheck`.
        supports_identity: It satisfies `SupportsIdentity`.
        supports_places: It satisfies `SupportsPlaces`.
        keeps_content_type: `stat` gives the content type back; off: it always gives None. On unless declared off, like all
            that follow.
        tells_upload_ids: A write of `parts_size` bytes has an id, and what `upload_begun` holds is called with it; off:
            unfinished writes are found by their location alone. It counts only where `supports_abort` is declared.
        keeps_etag: `stat` gives an etag; off: it always gives None.
        nests_objects: `a` and `a/b` can both be objects; off: the second of them may be refused.
        settles_races_in_parts: Of several multipart uploads to one location at a time exactly one creates the object; off: the
            service checks the location and joins the parts in two steps, so more than one may be told that it did.
        settles_races_of_copies: The same of copies; off: the service knows no condition for them.
        checks_signatures: The service behind signed URLs and requests checks them; off for a stand-in that takes any.
        has_pages: A listing is fetched in pages, whose size `with_page_size` sets.
        can_be_full: The store can be full; `with_room_for` makes one that soon is.
        can_refuse: The store can refuse permission; `refusing` makes it.
        can_be_unreachable: The store can be out of reach; `unreachable` makes it so.
        can_lose_answers: An answer can be lost; `losing_answers` loses one.
        is_shared: Other processes reach the same store; `elsewhere` tells them how.
        counts_unfinished: `count_unfinished` counts what unfinished writes left in the store.
        parts_size: A size, in bytes, that the backend writes in more than one part, if it has parts.
        large_size: The size of the stream of the memory test, in bytes.
        memory_growth: By how much that stream may make the memory grow, in bytes; a store in memory needs `large_size` more.
        batch_size: The most locations that the service deletes in one request.
        longest_location: The longest location, in bytes; less for a backend that puts a prefix before it.
        unstorable: Odd locations that the store cannot keep, and that the backend refuses before it reads a byte.
        clock_skew: How far the store's clock may be from this one's, in seconds.
        patience: How long a test waits for what must happen, in seconds.
    """
