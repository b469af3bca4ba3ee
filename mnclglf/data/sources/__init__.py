"""The sources of images: one class each, and this table."""

from mnclglf.config import FOLDER, check_dataset
from mnclglf.data.sources.cifar import Cifar10, Cifar100
from mnclglf.data.sources.digits import Digits, Mnist5k
from mnclglf.data.sources.fashion_mnist import FashionMnist
from mnclglf.data.sources.folder import Folder
from mnclglf.data.sources.source import Request, Source, cache_dir
from mnclglf.data.sources.tinyimagenet import TinyImageNet

SOURCES: dict[str, Source] = {
    source.name: source for source in (Mnist5k(), Digits(), FashionMnist(), Cifar10(), Cifar100(), TinyImageNet())
}

__all__ = ["SOURCES", "Request", "Source", "cache_dir", "source_of"]


def source_of(name: str) -> Source:
    """The source of this name, or of folder:PATH.

    Raises:
        ValueError: there is none.
    """
    check_dataset(name)
    return Folder(name) if name.startswith(FOLDER) else SOURCES[name]
