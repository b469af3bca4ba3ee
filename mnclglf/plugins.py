"""Methods and data sets of other packages: found by entry point, or by module and class. Imports nothing of ours.

The names of entry points are read without importing their packages, so that the command line can list them.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from importlib.metadata import EntryPoint, entry_points

METHODS_GROUP = "mnclglf.methods"
SOURCES_GROUP = "mnclglf.sources"


class PluginError(ValueError):
    """A method or a data set of another package cannot be used; the message says what is missing."""


@cache
def _found(group: str) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        if entry not in found.setdefault(entry.name, []):  # a package can be on the path twice
            found[entry.name].append(entry)
    return found


def plugin_names(group: str) -> tuple[str, ...]:
    """Returns the names of the entry points of a group, sorted."""
    return tuple(sorted(_found(group)))


def load_entry_point(group: str, name: str) -> object:
    """Imports what the entry point of this name names.

    Raises:
        PluginError: there is none, there are two, or its package cannot be imported.
    """
    found = _found(group).get(name, [])
    if not found:
        raise PluginError(
            f"{name!r} is no entry point of {group} that is installed here; install the package that it came with (pip "
            "install ...), into this Python"
        )
    if len(found) > 1:
        both = " and ".join(map(_described, found))
        raise PluginError(f"{name!r} is an entry point of {group} twice, {both}; uninstall one of them")
    try:
        return found[0].load()
    except Exception as error:  # of the package's own code
        raise PluginError(
            f"{name!r}, {_described(found[0])}, cannot be imported ({type(error).__name__}: {error}); repair or "
            "reinstall it"
        ) from error


def _described(entry: EntryPoint) -> str:
    package = "" if entry.dist is None else f" of {entry.dist.name} {entry.dist.version}"
    return f"{entry.value}{package}"


def is_class_name(name: str) -> bool:
    """Returns whether a name is that of a class in a module, MODULE:CLASS, as `class_name` gives it."""
    module, _, kind = name.partition(":")
    return bool(kind) and all(part.isidentifier() for part in (*module.split("."), *kind.split(".")))


def class_name(kind: type) -> str:
    """Returns the name MODULE:CLASS, by which `load_class` finds a class again.

    Raises:
        PluginError: the class is defined in a function, so that nothing could find it.
    """
    name = f"{kind.__module__}:{kind.__qualname__}"
    if not is_class_name(name):
        raise PluginError(
            f"{kind.__qualname__} of {kind.__module__} is defined within a function, where an evaluation could not "
            "find it; define it at the top of a module"
        )
    return name


def load_class(name: str) -> object:
    """Imports the class of a name MODULE:CLASS.

    Raises:
        PluginError: the module cannot be imported, or has no such class.
    """
    module, _, path = name.partition(":")
    remedy = "put the folder or the package that holds it on the Python path"
    if module == "__main__":
        remedy = "it was defined in a script: move it into a module that can be imported, or go on in that script"
    try:
        found: object = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        return found
    except ImportError as error:
        raise PluginError(f"{name!r} cannot be imported ({error}); {remedy}") from error
    except AttributeError as error:
        raise PluginError(f"module {module} has no {path} here; {remedy}") from error
    except Exception as error:  # of the module's own code
        raise PluginError(f"{name!r} cannot be imported ({type(error).__name__}: {error}); repair it") from error


def check_subclass(found: object, base: type, name: str) -> type:
    """Returns what was found under a name if it is a subclass of `base` that can be made.

    Raises:
        PluginError: it is something else, or lacks a method.
    """
    if not (isinstance(found, type) and issubclass(found, base)):
        what = found.__name__ if isinstance(found, type) else type(found).__name__
        raise PluginError(f"{name!r} is {what}, no subclass of {base.__module__}.{base.__name__}; derive it from that")
    if inspect.isabstract(found):
        lacking = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise PluginError(f"{name!r} lacks {lacking} of {base.__name__}; define it")
    return found
