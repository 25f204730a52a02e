"""Finding the application's binding by the name that the user gives."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from typing import Any

from granite_storage.exceptions import ConfigurationError
from granite_storage.orm.binding import StorageBinding

__all__ = ["load_binding"]


async def load_binding(name: str) -> StorageBinding:
    """Import what `module:attribute` names and return it, or what it returns where it is a callable, sync or async.

    Args:
        name: The name.

    Raises:
        ConfigurationError: It cannot be imported, or is no binding; the message says where, the cause is the error itself.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigurationError(f"--app must be module:attribute, such as myapp.storage:binding, not {name!r}")
    found = _attribute(_imported(module), attribute, name)
    if not isinstance(found, StorageBinding) and callable(found):
        found = await _returned(found, name)
    if not isinstance(found, StorageBinding):
        raise ConfigurationError(
            f"{name} is a {type(found).__name__}, and --app needs what bind_storage() returns, or a callable that returns it"
        )
    return found


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise ConfigurationError(f"there is no module {error.name!r} here; --app-dir says where to look") from error
        raise _failed(f"importing {module!r}", error) from error
    except Exception as error:
        raise _failed(f"importing {module!r}", error) from error


def _attribute(found: Any, attribute: str, name: str) -> Any:
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ConfigurationError(f"{name!r} names nothing: there is no {part!r} in {name.partition(':')[0]!r}") from error
    return found


async def _returned(factory: Any, name: str) -> Any:
    try:
        found = factory()
        return await found if inspect.isawaitable(found) else found
    except Exception as error:
        raise _failed(f"calling {name!r}", error) from error


def _failed(what: str, error: Exception) -> ConfigurationError:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(f"{sys.path[0]}{os.sep}")]
    place = f" ({(own or frames)[-1].filename}, line {(own or frames)[-1].lineno})"
    return ConfigurationError(f"{what} failed: {type(error).__name__}: {error}{place}")
