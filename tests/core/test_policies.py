"""What a policy refuses, and what a manager refuses to be built from."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from granite_storage import ConfigurationError, StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import UnknownBackendError, UnknownPolicyError
from tests.core.support import SLOT, pickled


class TestPolicy:
    @pytest.mark.case("POL-02")
    @pytest.mark.parametrize("max_size", [-1, True, False, "10MB", 1.5, 10.0, b"1", [1]])
    def test_what_is_no_number_of_bytes_is_refused(self, max_size: Any) -> None:
        with pytest.raises(ConfigurationError, match=r"max_size.*'files'"):
            StoragePolicy("files", "store", max_size=max_size)

    @pytest.mark.case("POL-02")
    @pytest.mark.parametrize("max_size", [0, 1, 2**70, None])
    def test_any_other_limit_is_taken(self, max_size: int | None) -> None:
        assert StoragePolicy("files", "store", max_size=max_size).max_size == max_size

    @pytest.mark.case("POL-03", "LOC-12")
    @pytest.mark.parametrize(
        "prefix",
        [
            "../x",
            "/abs",
            "a//b",
            "a/",
            "a\\b",
            ".",
            "..",
            "a/../b",
            "a/./b",
            "/",
            "a\x00",
            "a ",
            "a.",
            "a/b ",
            "\ud800",
            ".granite-x",
            "x" * 256,
            "/".join(["x" * 250] * 4),
            1,
            b"a",
            ["a"],
        ],
    )
    def test_an_unsafe_prefix_is_refused(self, prefix: Any) -> None:
        with pytest.raises(ConfigurationError, match=r"key_prefix.*'files'"):
            StoragePolicy("files", "store", key_prefix=prefix)

    @pytest.mark.case("POL-03")
    def test_an_empty_prefix_is_none(self) -> None:
        assert StoragePolicy("files", "store", key_prefix="") == StoragePolicy("files", "store")

    @pytest.mark.parametrize("prefix", ["a", "a/b", "tenant é/7", "x" * 255])
    def test_a_safe_prefix_is_taken_as_it_is(self, prefix: str) -> None:
        assert StoragePolicy("files", "store", key_prefix=prefix).key_prefix == prefix

    @pytest.mark.parametrize("name", ["", None, 1, b"files"])
    def test_keys_are_text(self, name: Any) -> None:
        with pytest.raises(ConfigurationError, match="storage_key"):
            StoragePolicy(name, "store")
        with pytest.raises(ConfigurationError, match="backend_key"):
            StoragePolicy("files", name)

    def test_it_is_a_frozen_value(self) -> None:
        policy = StoragePolicy("files", "store", max_size=1, key_prefix="a")
        with pytest.raises(dataclasses.FrozenInstanceError):
            policy.max_size = 2  # type: ignore[misc]
        assert pickled(policy) == copy.deepcopy(policy) == policy
        assert hash(policy) == hash(copy.copy(policy))


class TestManagerConfiguration:
    @pytest.mark.case("POL-01")
    def test_an_unknown_backend_is_named_with_its_policy(self) -> None:
        with pytest.raises(UnknownBackendError, match=r"'files'.*'elsewhere'.*store"):
            StorageManager(backends={"store": MemoryStorageBackend()}, policies={"files": StoragePolicy("files", "elsewhere")})

    @pytest.mark.case("POL-01")
    def test_one_policy_under_two_keys_is_refused(self) -> None:
        policy = StoragePolicy("files", "store")
        with pytest.raises(ConfigurationError, match=r"'more'.*'files'"):
            StorageManager(backends={"store": MemoryStorageBackend()}, policies={"files": policy, "more": policy})

    @pytest.mark.case("POL-01")
    def test_later_changes_of_what_was_given_do_not_count(self) -> None:
        backends, policies = {"store": MemoryStorageBackend()}, {"files": StoragePolicy("files", "store")}
        manager = StorageManager(backends=backends, policies=policies)
        backends.clear()
        policies.clear()
        assert list(manager.backends) == ["store"]
        assert list(manager.policies) == ["files"]
        with pytest.raises(TypeError):
            manager.policies["more"] = StoragePolicy("more", "store")  # type: ignore[index]

    @pytest.mark.parametrize("backend", [None, "local", object(), MemoryStorageBackend])
    def test_what_is_no_backend_is_refused(self, backend: Any) -> None:
        with pytest.raises(ConfigurationError, match="'store'"):
            StorageManager(backends={"store": backend}, policies={})

    @pytest.mark.parametrize("policy", [None, "files", {"storage_key": "files"}])
    def test_what_is_no_policy_is_refused(self, policy: Any) -> None:
        with pytest.raises(ConfigurationError, match="'files'"):
            StorageManager(backends={}, policies={"files": policy})

    @pytest.mark.parametrize("key", ["", 1, None])
    def test_a_backend_key_is_text(self, key: Any) -> None:
        with pytest.raises(ConfigurationError, match="key"):
            StorageManager(backends={key: MemoryStorageBackend()}, policies={})

    @pytest.mark.parametrize("wrong", [[], None, "store"])
    def test_both_are_mappings(self, wrong: Any) -> None:
        with pytest.raises(ConfigurationError, match="backends"):
            StorageManager(backends=wrong, policies={})
        with pytest.raises(ConfigurationError, match="policies"):
            StorageManager(backends={}, policies=wrong)

    @pytest.mark.parametrize("seconds", [-1, "30", None, True, float("nan")])
    def test_the_time_to_drain_is_a_time(self, seconds: Any) -> None:
        with pytest.raises(ConfigurationError, match="drain_timeout"):
            StorageManager(backends={}, policies={}, drain_timeout=seconds)

    @pytest.mark.case("POL-01")
    @pytest.mark.parametrize("key", ["other", "", None, 1, ["files"]])
    async def test_there_is_no_policy_to_fall_back_to(self, key: Any) -> None:
        manager = StorageManager(backends={"store": MemoryStorageBackend()}, policies={"files": StoragePolicy("files", "store")})
        with pytest.raises(UnknownPolicyError, match="files"):
            await manager.put_bytes(**{**SLOT, "storage_key": key}, content=b"")
        with pytest.raises(UnknownBackendError, match="store"):
            manager.backend(key)
        assert [info async for info in manager.backend("store").iter_objects()] == []
