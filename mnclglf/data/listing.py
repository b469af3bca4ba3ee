"""The images of a source in one fixed order, each read when it is needed.

A folder is listed, not examined: nothing is decoded in advance, and what is kept per file is its name and its label.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mnclglf.config import FOLDER
from mnclglf.data.datasets import load_dataset
from mnclglf.data.errors import DataError, unreadable
from mnclglf.data.images import EncodedImages, ImageSet
from mnclglf.data.sources import Request
from mnclglf.data.sources.folder import Folder, read_usable, stamp
from mnclglf.data.sources.layout import find_images, find_splits, images_below

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Listing(ABC):
    """n images: the training images, then the test images."""

    names: Sequence[str]
    """[n]: paths of files relative to the source, else the split and the number, e.g. train/17."""
    labels: NDArray[np.int32]
    """[n]: row of the class in `classes`; -1 for images without labels."""
    classes: tuple[str, ...]
    """Names of the classes; empty for images without labels."""
    train_images: int
    """Number of training images, which come first."""

    def __len__(self) -> int:
        return len(self.names)

    def split(self, row: int) -> str:
        """Returns train or test."""
        return "train" if row < self.train_images else "test"

    def class_of(self, row: int) -> str | None:
        """Returns the name of an image's class; None for an image without a label."""
        label = int(self.labels[row])
        return None if label < 0 else self.classes[label]

    @abstractmethod
    def pixels(self, row: int) -> NDArray[np.uint8]:
        """Returns the image at this row, uint8 [H, W, 3].

        Raises:
            DataError: the image cannot be used; the message begins with its path.
        """

    @abstractmethod
    def state(self, row: int) -> bytes:
        """Returns what is different after the image at this row was replaced."""

    def identity(self, row: int) -> bytes:
        """Returns what tells the image at this row from others: name, class and state."""
        named = f"{self.names[row]}\0{self.class_of(row)}\0".encode(errors="surrogateescape")
        return named + self.state(row)

    def digest(self, rows: Iterable[int]) -> hashlib._Hash:  # pyright: ignore[reportPrivateUsage]  # has no other name
        """Returns a SHA-256 that has taken in the identities of these images."""
        made = hashlib.sha256()
        for row in rows:
            made.update(self.identity(row))
        return made


@dataclass(frozen=True, kw_only=True)
class FileListing(Listing):
    """Image files below a folder."""

    root: Path

    def pixels(self, row: int) -> NDArray[np.uint8]:
        return read_usable(self.root / self.names[row]).pixels

    def state(self, row: int) -> bytes:
        """Returns size, times and inode of the file: it is not read."""
        return repr(tuple(stamp(self.root / self.names[row]))).encode()


@dataclass(frozen=True, kw_only=True)
class SetListing(Listing):
    """Images of a data set."""

    train: ImageSet
    test: ImageSet | None

    def pixels(self, row: int) -> NDArray[np.uint8]:
        if self.test is None or row < self.train_images:
            return self.train.pixels(row)
        return self.test.pixels(row - self.train_images)

    def state(self, row: int) -> bytes:
        return self.pixels(row).tobytes()


def list_source(
    name: str, data_dir: Path | None = None, *, download: bool = False, skip_corrupt: bool = False
) -> Listing:
    """Lists the images of a data set, or of folder:PATH, whose files are not read.

    Per file of a folder about 130 bytes are kept.

    Args:
        name: name of the data set.
        data_dir: folder of its files; None looks in its usual places.
        download: fetch missing files.
        skip_corrupt: leave out images that cannot be read, of a data set that reads them now.

    Raises:
        ValueError: there is no data set of this name.
        DataError: there is no image, or files are missing or cannot be listed.
    """
    if name.startswith(FOLDER):
        folder = Folder(name)
        folder.check(Request(data_dir=data_dir, download=download))
        try:
            return list_folder(folder.root)
        except PermissionError as error:
            raise unreadable(Path(error.filename or folder.root), error) from error
    train, test = load_dataset(name, data_dir, download=download, skip_corrupt=skip_corrupt)
    sets = [train] if test is None else [train, test]
    return SetListing(
        names=[
            f"{images.split}/{name}"
            for images in sets
            for name in (images.paths if isinstance(images, EncodedImages) else range(len(images)))
        ],
        labels=np.concatenate([images.labels for images in sets]).astype(np.int32),
        classes=train.classes,
        train_images=len(train),
        train=train,
        test=test,
    )


def list_folder(root: Path) -> FileListing:
    """Lists the image files below a folder, with splits and labels as folder:PATH has them.

    A folder that lies otherwise, e.g. with images beside its subfolders, is listed without labels, and a warning says
    why.

    Raises:
        DataError: there is no image, or a folder cannot be listed.
    """
    try:
        train_folder, test_folder = find_splits(root)
        names, labels, classes = find_images(train_folder)
        names, train_images = _below(root, train_folder, names), len(names)
        if test_folder is not None:
            test_names, test_labels, _ = find_images(test_folder, classes)
            names += _below(root, test_folder, test_names)
            labels += test_labels
    except DataError as error:
        names = images_below(root)
        if not names:
            raise
        logger.warning("no labels and no splits: %s", error)
        labels, classes, train_images = [-1] * len(names), (), len(names)
    return FileListing(
        names=names, labels=np.array(labels, np.int32), classes=classes, train_images=train_images, root=root.resolve()
    )


def _below(root: Path, folder: Path, names: list[str]) -> list[str]:
    """Returns names in `folder` as names in `root`."""
    return names if folder == root else [f"{folder.relative_to(root)}/{name}" for name in names]
