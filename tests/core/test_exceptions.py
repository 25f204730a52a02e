"""The family of errors."""

from __future__ import annotations

import copy
import inspect

import pytest

import granite_storage
from granite_storage import exceptions
from tests.core.support import pickled

FAMILY = [value for value in vars(exceptions).values() if inspect.isclass(value) and issubclass(value, exceptions.StorageError)]


@pytest.mark.parametrize("error", FAMILY)
def test_none_looks_like_a_client_that_went_away(error: type[Exception]) -> None:
    assert not issubclass(error, OSError)


@pytest.mark.parametrize("error", FAMILY)
def test_each_is_public_and_explained(error: type[Exception]) -> None:
    assert error.__name__ in exceptions.__all__
    assert getattr(granite_storage, error.__name__, error) is error
    assert error.__doc__


@pytest.mark.parametrize("error", FAMILY)
def test_each_pickles_and_copies_with_its_attributes(error: type[Exception]) -> None:
    names = [name for name in inspect.signature(error.__init__).parameters if name not in ("self", "args", "kwargs", "message")]
    made = error("what happened", **dict.fromkeys(names, 7))
    made.add_note("a note")
    for again in (pickled(made), copy.copy(made)):
        assert type(again) is error
        assert str(again) == "what happened"
        assert [getattr(again, name) for name in names] == [7] * len(names)
        assert again.__notes__ == ["a note"]


def test_the_builtin_relatives() -> None:
    assert issubclass(exceptions.UnknownPolicyError, LookupError)
    assert issubclass(exceptions.UnknownBackendError, LookupError)
    assert issubclass(exceptions.MissingDependencyError, ImportError)
    assert issubclass(exceptions.InvalidLocationError, ValueError)
    assert issubclass(exceptions.InvalidReferenceError, ValueError)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = granite_storage.Nothing
    assert "StorageManager" in dir(granite_storage)
