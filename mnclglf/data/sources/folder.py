"""folder:PATH: a user's own image files, of any size, labeled by subfolder or not."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mnclglf.config import FOLDER, DataConfig
from mnclglf.data.decoding import Decoded, read_file
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageFiles
from mnclglf.data.sources.examination import DRAWN, Examined, fields_of, kept_numbers, look_at, usable
from mnclglf.data.sources.examination import examine as examine_files
from mnclglf.data.sources.layout import few, find_images, find_splits, report_pictures
from mnclglf.data.sources.source import Request, Source, cache_dir
from mnclglf.data.stamp import Stamp

logger = logging.getLogger(__name__)


class Folder(Source):
    """Source of the image files below a folder.

    Subfolders train and val (or test), in any usual spelling, hold the training and the test images; without them all
    images are for training.
    The first level of subfolders names the classes; files without subfolders have no labels.

    Args:
        name: folder:PATH.
    """

    sized = False
    quick_data = DataConfig(image_size=32)

    def __init__(self, name: str) -> None:
        self.name = name
        self.root = Path(name.removeprefix(FOLDER)).expanduser()

    def check(self, request: Request) -> None:
        """Raises DataError unless the folder is there and is the only one that is named."""
        if request.data_dir is not None:
            raise DataError(
                f"data_dir {request.data_dir} names a second folder beside {self.name}; leave out --data-dir, or give "
                f"{FOLDER}{request.data_dir}"
            )
        if not self.root.is_dir():
            raise DataError(
                f"{self.root} is not a folder; give the folder of your images as {FOLDER}PATH, and the new place of a "
                "run's images that were moved as --data-dir"
            )

    def load(self, request: Request) -> tuple[ImageFiles, ImageFiles | None]:
        self.check(request)
        train_folder, test_folder = find_splits(self.root)
        train = self._image_set(train_folder, "train", request.skip_corrupt)
        if test_folder is None:
            return train, None
        test = self._image_set(test_folder, "test", request.skip_corrupt, classes=train.classes)
        counts = np.bincount(test.labels, minlength=len(train.classes)) if train.classes else np.ones(1)
        if not counts.all():
            absent = [name for name, count in zip(train.classes, counts, strict=True) if not count]
            logger.warning("%s has no image of %s, which is left out of the accuracy", test_folder, few(absent))
        return train, test

    def _image_set(
        self, root: Path, split: str, skip_corrupt: bool, *, classes: tuple[str, ...] | None = None
    ) -> ImageFiles:
        paths, labels, classes = find_images(root, classes)
        found = examine(root, paths)
        report_pictures(root, [root / path for path, entry in zip(paths, found, strict=True) if entry.problem == DRAWN])
        kept = kept_numbers(paths, found, root, skip_corrupt=skip_corrupt)
        unusable = set(labels) - {labels[number] for number in kept}
        if unusable and split == "train":
            names = few([classes[label] for label in sorted(unusable)]) if classes else "any"
            raise DataError(f"{root} has no image of class {names} that can be used; repair them, or remove its folder")
        return ImageFiles(
            name=self.name,
            split=split,
            labels=np.array(labels, dtype=np.int64)[kept],
            classes=classes,
            root=root.resolve(),
            modified=np.array([found[number].stamp.modified for number in kept], np.int64),
            **fields_of(paths, found, kept),
        )


def examine(root: Path, paths: Sequence[str]) -> list[Examined]:
    """Decodes every image below `root` once and returns the findings, which are kept in `cache_dir("folder")`."""
    key = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:32]

    def look(number: int) -> Examined:
        path = root / paths[number]
        return look_at(lambda: read_file(path), path, stamp(path))

    stamps = [stamp(root / path) for path in paths]
    return examine_files(paths, stamps, look, index=cache_dir("folder") / f"{key}.npz", place=root)


def stamp(path: Path) -> Stamp:
    """Returns the stamp of a file; zeros if it cannot be accessed."""
    try:
        return Stamp.of(path.stat())
    except OSError:
        return Stamp()


def read_usable(path: Path) -> Decoded:
    """Returns the image of a file that counts as an image of a folder.

    Raises:
        DataError: the file cannot be read, its image is too small, or it is a picture that we drew (it then ends with
            DRAWN).
    """
    return usable(read_file(path), path)
