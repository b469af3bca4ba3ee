"""Table of the data sets, one class each. Importing it loads no torch, so the command line can read it."""

from functools import cache
from pathlib import Path

from mnclglf.config import FOLDER, OBJECT, PARQUET, PLACED, SHARDS, kept_name, require, split_name
from mnclglf.data.sources.cifar import Cifar10, Cifar100
from mnclglf.data.sources.digits import Digits, Mnist5k
from mnclglf.data.sources.fashion_mnist import FashionMnist
from mnclglf.data.sources.folder import Folder
from mnclglf.data.sources.objects import given_object
from mnclglf.data.sources.parquet import Parquet
from mnclglf.data.sources.shards import Shards
from mnclglf.data.sources.source import Request, Source, cache_dir
from mnclglf.data.sources.tinyimagenet import TinyImageNet
from mnclglf.plugins import (
    SOURCES_GROUP,
    PluginError,
    check_subclass,
    is_class_name,
    load_class,
    load_entry_point,
    plugin_names,
)

SOURCES: dict[str, Source] = {
    "mnist5k": Mnist5k(),
    "digits": Digits(),
    "fashion_mnist": FashionMnist(),
    "cifar10": Cifar10(),
    "cifar100": Cifar100(),
    "tinyimagenet": TinyImageNet(),
}
"""Sources by the name that --dataset takes."""

OTHER_SOURCES = tuple(name for name in plugin_names(SOURCES_GROUP) if name not in SOURCES)
"""Names of the sources that other packages give as entry points; a built-in source hides one of its name."""

__all__ = ["OTHER_SOURCES", "SOURCES", "Request", "Source", "cache_dir", "is_dataset", "named_or_folder", "source_of"]


def is_dataset(name: str) -> bool:
    """Returns whether `source_of` knows the name: of the table, of an entry point, of a place, or MODULE:CLASS."""
    if name.startswith((*PLACED, OBJECT)):
        return name not in (*PLACED, OBJECT)
    return name in SOURCES or name in OTHER_SOURCES or is_class_name(name)


def source_of(name: str) -> Source:
    """Returns the source of this name: of SOURCES, of an entry point of the group mnclglf.sources, of folder:PATH, of
    shards:PATTERN, of parquet:PATTERN, of object:CLASS for a Dataset object of this program, or MODULE:CLASS.

    Raises:
        ValueError: there is no source of this name, or it cannot be imported.
    """
    require(
        is_dataset(name),
        f"dataset {name!r} is none of {', '.join((*SOURCES, *OTHER_SOURCES))}; for image files of your own give "
        f"folder:PATH, for tar files of them shards:PATTERN, for Parquet files parquet:PATTERN, and install the "
        f"package that gives it if it is an entry point of {SOURCES_GROUP}",
    )
    if name.startswith(FOLDER):
        return Folder(name)
    if name.startswith(SHARDS):
        return Shards(name)
    if name.startswith(PARQUET):
        return Parquet(name)
    if name.startswith(OBJECT):
        return given_object(name)
    return SOURCES[name] if name in SOURCES else _other_source(name)


def named_or_folder(text: str) -> str:
    """Returns the name of a source, of one that is a place with its whole path; a plain path is that of a folder.

    A name of the table or of an entry point is that data set, also where a folder has the same name.

    Raises:
        ValueError: it is neither.
    """
    prefix, place = split_name(text)
    if text in SOURCES or text in OTHER_SOURCES or (prefix not in ("", FOLDER) and place):
        return kept_name(text)
    path = Path(text.removeprefix(FOLDER)).expanduser()
    if is_dataset(text) and not text.startswith(FOLDER) and not path.is_dir():
        return text  # MODULE:CLASS or object:CLASS
    require(
        text.startswith(FOLDER) or path.is_dir(),
        f"source {text!r} is no folder and none of {', '.join((*SOURCES, *OTHER_SOURCES))}; give the folder of your "
        "image files",
    )
    require(text not in ("", FOLDER), f"source {text!r} names no folder; give folder:PATH")
    return kept_name(f"{FOLDER}{text.removeprefix(FOLDER)}")


@cache
def _other_source(name: str) -> Source:
    """Makes the source of another package."""
    found = load_class(name) if is_class_name(name) else load_entry_point(SOURCES_GROUP, name)
    source = found if isinstance(found, Source) else check_subclass(found, Source, name)()
    called = getattr(source, "name", None)
    if not is_class_name(name) and called != name:
        raise PluginError(f"the source of the entry point {name!r} has the name {called!r}; give both the same")
    return source
