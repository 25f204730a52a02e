"""Refs: written, read back, of other versions, of other origin, and of no ref at all."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from granite_storage import StorageManager, StoredObjectRef
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import InvalidReferenceError
from tests.core.support import SLOT, manager_on, pickled, texts

CHECKSUM = "sha256:" + "0123456789abcdef" * 4
LEAST = {"storage_key": "files", "backend": "store", "location": "a/b", "size": 3}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts(max_size=10), inner, max_size=4),
    max_leaves=20,
)
REFS = st.fixed_dictionaries(
    {
        "storage_key": texts(min_size=1),
        "backend": texts(min_size=1),
        "location": texts(min_size=1),
        "size": st.integers(0, 2**63 - 1),
        "checksum": st.sampled_from(["", CHECKSUM]),
        "content_type": st.none() | texts(),
        "original_filename": st.none() | texts(),
        "created_at": st.none() | st.just("2024-05-06T07:08:09.000010+00:00"),
        "extra": st.none() | st.dictionaries(texts(), JSON),
    },
)


def ref(**changes: Any) -> StoredObjectRef:
    return StoredObjectRef.from_dict({**LEAST, "extra": {"a": [1, {"b": 2}]}, **changes})


class TestReadingBack:
    @given(REFS, st.dictionaries(texts().filter(lambda key: key not in LEAST), JSON, max_size=3))
    def test_what_was_written_is_read_and_written_again(self, data: dict[str, Any], unknown: dict[str, Any]) -> None:
        known = {field.name for field in dataclasses.fields(StoredObjectRef)}
        data = {**{key: value for key, value in unknown.items() if key not in known}, **data}
        read = StoredObjectRef.from_dict(json.loads(json.dumps(data)))
        assert read.to_dict() == data
        assert StoredObjectRef.from_dict(read.to_dict()) == read
        assert pickled(read).to_dict() == data

    @pytest.mark.case("REF-01")
    def test_an_old_one_lacks_what_came_later(self) -> None:
        old = StoredObjectRef.from_dict(LEAST)
        assert (old.checksum, old.content_type, old.original_filename, old.created_at, old.extra) == ("", None, None, None, None)

    @pytest.mark.case("REF-01", "REF-03")
    @pytest.mark.parametrize("checksum", [None, ""])
    async def test_an_unknown_checksum_is_not_verified(self, checksum: str | None) -> None:
        async with manager_on(MemoryStorageBackend()) as manager:
            stored = await manager.put_bytes(**SLOT, content=b"abc")
            unknown = StoredObjectRef.from_dict({**stored.to_dict(), "checksum": checksum})
            assert await manager.get(unknown) == b"abc"
            copied = await manager.copy(unknown, model_name="m", entity_id="1", field_name="f")
            assert copied.checksum == ""

    def test_a_newer_one_keeps_what_this_version_does_not_know(self) -> None:
        newer = ref(version=9, future={"deep": [1, 2]})
        assert newer.to_dict()["future"] == {"deep": [1, 2]}
        assert StoredObjectRef.from_dict(newer.to_dict()).to_dict() == newer.to_dict()
        assert copy.deepcopy(newer).to_dict()["version"] == 9
        assert newer == ref()

    @pytest.mark.case("REF-03")
    @pytest.mark.parametrize(
        "checksum",
        ["md5:d41d8cd98f00b204e9800998ecf8427e", "sha256:ABC", "sha256:", "sha256:" + "a" * 65, "a" * 64, 1, ["sha256"]],
    )
    def test_a_checksum_that_is_none_is_refused(self, checksum: Any) -> None:
        with pytest.raises(InvalidReferenceError, match="checksum"):
            ref(checksum=checksum)

    @pytest.mark.case("REF-03", "STR-09")
    def test_hex_is_compared_in_one_form(self) -> None:
        assert ref(checksum=CHECKSUM.upper()).checksum == CHECKSUM

    @pytest.mark.case("REF-11")
    @pytest.mark.parametrize(
        ("written", "read"),
        [
            ("2024-05-06T07:08:09", "2024-05-06T07:08:09.000000+00:00"),
            ("2024-05-06T07:08:09Z", "2024-05-06T07:08:09.000000+00:00"),
            ("2024-05-06T09:08:09+02:00", "2024-05-06T07:08:09.000000+00:00"),
            ("2024-05-06 07:08:09.123456", "2024-05-06T07:08:09.123456+00:00"),
            ("2024-05-06", "2024-05-06T00:00:00.000000+00:00"),
            (1714979289, "2024-05-06T07:08:09.000000+00:00"),
            (1714979289.5, "2024-05-06T07:08:09.500000+00:00"),
            (0, "1970-01-01T00:00:00.000000+00:00"),
            (None, None),
        ],
    )
    def test_times_have_one_form(self, written: Any, read: str | None) -> None:
        assert ref(created_at=written).created_at == read

    @pytest.mark.case("REF-11")
    @pytest.mark.parametrize(
        "time", ["yesterday", "", "2024-13-01", True, [], {}, 1e300, float("nan"), 10**30, -(10**30), "0001-01-01T00:00:00+14:00"]
    )
    def test_what_is_no_time_is_refused(self, time: Any) -> None:
        with pytest.raises(InvalidReferenceError, match="created_at"):
            ref(created_at=time)

    @pytest.mark.parametrize("field", ["storage_key", "backend", "location"])
    @pytest.mark.parametrize("value", [None, "", 1, b"a", ["a"], {"a": 1}])
    def test_what_must_be_text_is(self, field: str, value: Any) -> None:
        with pytest.raises(InvalidReferenceError, match=field):
            ref(**{field: value})

    @pytest.mark.parametrize("field", ["content_type", "original_filename"])
    @pytest.mark.parametrize("value", [1, b"a", ["a"], False])
    def test_what_may_be_text_is_no_other_thing(self, field: str, value: Any) -> None:
        with pytest.raises(InvalidReferenceError, match=field):
            ref(**{field: value})

    @pytest.mark.parametrize("size", [-1, "3", 3.0, True, None, 2**63, 10**5000, -(10**5000)], ids=lambda _: "size")
    def test_a_size_is_a_number_of_bytes(self, size: Any) -> None:
        with pytest.raises(InvalidReferenceError, match="size"):
            ref(size=size)

    @pytest.mark.parametrize("data", [None, "ref", "{}", b"{}", 1, [], [("storage_key", "a")]])
    def test_what_is_no_mapping_is_no_ref(self, data: Any) -> None:
        with pytest.raises(InvalidReferenceError, match="mapping"):
            StoredObjectRef.from_dict(data)

    @pytest.mark.case("REF-12")
    def test_the_order_of_keys_does_not_matter(self) -> None:
        data = ref(checksum=CHECKSUM, extra={"x": 1, "y": {"b": 1, "a": 2}}).to_dict()
        shuffled = json.loads(json.dumps(data, sort_keys=True))
        assert list(shuffled) != list(data)
        assert StoredObjectRef.from_dict(shuffled) == StoredObjectRef.from_dict(data)


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "lists" else {"a": value}
    return value


class TestBounds:
    @pytest.mark.case("REF-06")
    @pytest.mark.parametrize("kind", ["lists", "dicts"])
    @pytest.mark.parametrize("field", ["extra", "unknown", "location", "size", "checksum", "created_at", "content_type"])
    def test_deep_nesting_is_refused_without_recursion(self, kind: str, field: str) -> None:
        with pytest.raises(InvalidReferenceError):
            ref(**{field: {"a": nested(10_000, kind)}})

    @pytest.mark.case("REF-06")
    @pytest.mark.parametrize("key", ["extra", "unknown"])
    @pytest.mark.parametrize(
        "content",
        [
            {"a": "x" * (5 << 20)},
            {"x" * (5 << 20): 1},
            {"a": list(range(100_000))},
            {str(number): number for number in range(20_000)},
            {"a": [[]] * 20_000},
            {"a": 10**5000},
        ],
        ids=["text", "key", "list", "dict", "lists", "digits"],
    )
    def test_a_size_out_of_all_proportion_is_refused(self, key: str, content: Any) -> None:
        with pytest.raises(InvalidReferenceError):
            ref(**{key: content})

    @pytest.mark.case("REF-06")
    def test_of_duplicate_keys_the_last_counts(self) -> None:
        assert StoredObjectRef.from_dict(json.loads(json.dumps(LEAST)[:-1] + ', "size": 4}')).size == 4

    @pytest.mark.parametrize("value", [b"a", {1}, object(), float("nan"), float("inf"), 1j, {1: 2}])
    def test_what_json_does_not_have_is_refused(self, value: Any) -> None:
        with pytest.raises(InvalidReferenceError, match="extra"):
            ref(extra={"a": value})

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            (float("nan"), "holds nan, which JSON cannot"),
            (float("-inf"), "holds -inf, which"),
            (1 << 2000, "an integer of 2001 bits, more than 1024"),
        ],
        ids=["nan", "infinity", "digits"],
    )
    def test_a_number_that_json_does_not_have_is_named(self, value: Any, said: str) -> None:
        with pytest.raises(InvalidReferenceError, match=said):
            ref(extra={"a": value})

    @pytest.mark.parametrize("extra", ["a", ["a"], 1, True])
    def test_extra_is_a_mapping(self, extra: Any) -> None:
        with pytest.raises(InvalidReferenceError, match="extra"):
            ref(extra=extra)

    def test_a_circle_is_refused(self) -> None:
        circle: dict[str, Any] = {}
        circle["again"] = circle
        with pytest.raises(InvalidReferenceError):
            ref(extra=circle)


class TestImmutable:
    @pytest.mark.case("REF-10")
    @pytest.mark.parametrize(
        "change",
        [
            lambda extra: extra.__setitem__("k", 1),
            lambda extra: extra.__delitem__("a"),
            lambda extra: extra.update(k=1),
            lambda extra: extra.setdefault("k", 1),
            lambda extra: extra.pop("a"),
            lambda extra: extra.popitem(),
            lambda extra: extra.clear(),
            lambda extra: extra.__ior__({"k": 1}),
            lambda extra: extra["a"].append(1),
            lambda extra: extra["a"].__setitem__(0, 1),
            lambda extra: extra["a"].__delitem__(0),
            lambda extra: extra["a"].__iadd__([1]),
            lambda extra: extra["a"].__imul__(2),
            lambda extra: extra["a"].extend([1]),
            lambda extra: extra["a"].insert(0, 1),
            lambda extra: extra["a"].pop(),
            lambda extra: extra["a"].remove(1),
            lambda extra: extra["a"].reverse(),
            lambda extra: extra["a"].sort(),
            lambda extra: extra["a"].clear(),
            lambda extra: extra["a"][1].update(k=1),
        ],
    )
    def test_extra_cannot_be_changed_in_place(self, change: Any) -> None:
        unchanged = ref()
        with pytest.raises(TypeError, match="read-only"):
            change(unchanged.extra)
        assert unchanged == ref()

    @pytest.mark.case("REF-10")
    def test_fields_cannot_be_changed(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            ref().size = 4  # type: ignore[misc]

    def test_it_does_not_share_what_it_was_made_of(self) -> None:
        mine = {"a": [1]}
        made = StoredObjectRef("files", "store", "a", 1, "", extra=mine)
        mine["a"].append(2)
        assert made.extra == {"a": [1]}
        made.to_dict()["extra"]["a"].append(3)
        assert made.extra == {"a": [1]}

    @pytest.mark.case("REF-13")
    def test_copies_and_pickles_are_equal(self) -> None:
        made = ref(checksum=CHECKSUM, future=1)
        for again in (copy.copy(made), copy.deepcopy(made), *(pickled(made, n) for n in range(2, 6))):
            assert again == made
            assert hash(again) == hash(made)
            assert again.to_dict() == made.to_dict()
            with pytest.raises(TypeError):
                again.extra["a"].append(1)
        assert copy.deepcopy(made.extra) is made.extra
        assert pickled(made.extra) == made.extra

    @pytest.mark.case("REF-13")
    def test_equal_by_fields_and_hashed_by_place(self) -> None:
        assert ref() == ref()
        assert ref() != ref(size=4)
        assert hash(ref()) == hash(ref(size=4)) != hash(ref(location="c"))
        assert ref() != ref().to_dict()
        assert dataclasses.replace(ref(), size=4) == ref(size=4)
        assert len({ref(), ref(), ref(size=4)}) == 2

    @pytest.mark.case("REF-13", "RE-15")
    async def test_it_is_a_response_model(self) -> None:
        app = FastAPI()
        made = ref(checksum=CHECKSUM)

        @app.get("/")
        async def show() -> StoredObjectRef:
            return made

        @app.post("/")
        async def take(given: StoredObjectRef) -> None:
            raise AssertionError("a client cannot send a ref")

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            shown = (await client.get("/")).json()
            assert shown == made.to_dict()
            assert (await client.post("/", json=shown)).status_code == 422

    @pytest.mark.case("REF-13", "POL-08")
    async def test_it_holds_no_handle_and_no_secret(self) -> None:
        manager: StorageManager = manager_on(MemoryStorageBackend())
        stored = await manager.put_bytes(**SLOT, content=b"abc", extra={"mine": 1})
        assert {type(value) for value in stored.to_dict().values()} <= {str, int, dict, type(None)}
        assert not hasattr(stored, "__dict__")
