"""The family of errors."""

from __future__ import annotations

import copy
import inspect
import re
import traceback

import pytest

import granite_storage
from granite_storage import StorageManager, exceptions
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
    ours = ("self", "args", "kwargs", "message", "see")
    names = [name for name in inspect.signature(error.__init__).parameters if name not in ours]
    made = error("what happened", **dict.fromkeys(names, 7))
    made.add_note("a note")
    for again in (pickled(made), copy.copy(made)):
        assert type(again) is error
        assert str(again) == "what happened"
        assert [getattr(again, name) for name in names] == [7] * len(names)
        assert again.__notes__ == made.__notes__
        assert again.__notes__[-1] == "a note"
        assert again.docs == made.docs


@pytest.mark.parametrize("error", FAMILY)
def test_a_traceback_shows_the_page_of_an_error_once(error: type[exceptions.StorageError]) -> None:
    made = pickled(error("what happened"))
    shown = "".join(traceback.format_exception_only(made))
    pages = [made.docs] if made.docs else []
    assert str(made) == "what happened"
    assert re.findall(r"^See (.*)$", shown, re.MULTILINE) == pages


def test_an_error_of_configuration_leads_to_the_page_of_its_subject() -> None:
    with pytest.raises(exceptions.ConfigurationError) as plain:
        StorageManager(backends=[], policies={})  # type: ignore[arg-type]
    assert plain.value.docs == "https://granite-storage.readthedocs.io/en/stable/guide.html#configuring-the-manager"
    with pytest.raises(exceptions.UnknownPolicyError) as unknown:
        StorageManager(backends={}, policies={}).policy("avatars")
    assert unknown.value.docs == plain.value.docs


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
