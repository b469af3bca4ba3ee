"""Table of the data sets, one class each. Importing it loads no torch, so the command line can read it."""

from mnclglf.config import FOLDER, require
from mnclglf.data.sources.cifar import Cifar10, Cifar100
from mnclglf.data.sources.digits import Digits, Mnist5k
from mnclglf.data.sources.fashion_mnist import FashionMnist
from mnclglf.data.sources.folder import Folder
from mnclglf.data.sources.source import Request, Source, cache_dir
from mnclglf.data.sources.tinyimagenet import TinyImageNet

SOURCES: dict[str, Source] = {
    "mnist5k": Mnist5k(),
    "digits": Digits(),
    "fashion_mnist": FashionMnist(),
    "cifar10": Cifar10(),
    "cifar100": Cifar100(),
    "tinyimagenet": TinyImageNet(),
}
"""Sources by the name that --dataset takes."""

__all__ = ["SOURCES", "Request", "Source", "cache_dir", "is_dataset", "source_of"]


def is_dataset(name: str) -> bool:
    """Returns True for a name of the table and for folder:PATH."""
    return name in SOURCES or (name.startswith(FOLDER) and name != FOLDER)


def source_of(name: str) -> Source:
    """Returns the source of this name, or of folder:PATH.

    Raises:
        ValueError: there is no source of this name.
    """
    require(
        is_dataset(name),
        f"dataset {name!r} is none of {', '.join(SOURCES)}; for image files of your own give folder:PATH",
    )
    return Folder(name) if name.startswith(FOLDER) else SOURCES[name]
