"""The base of the sources whose images lie together in large files: shards:PATTERN and parquet:PATTERN."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mnclglf.config import DataConfig, shown, split_name
from mnclglf.data.errors import DataError, UnreachableError
from mnclglf.data.packed import PackedImages, Store
from mnclglf.data.ranges import RangeFile, range_file
from mnclglf.data.sources.examination import DRAWN, NO_LABEL, Examined, examine, fields_of, kept_numbers, look_at
from mnclglf.data.sources.layout import few
from mnclglf.data.sources.objects import MOST_CLASSES
from mnclglf.data.sources.patterns import find_files
from mnclglf.data.sources.source import Request, Source, cache_dir

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The images of one large file."""

    file: RangeFile
    names: Sequence[str]
    """Names of the images in the file."""
    sizes: Sequence[int]
    """Bytes of each."""
    label: Callable[[int], int]
    """Returns the label of the image of a number in this file; NO_LABEL if it has none.

    Raises DataError if it cannot be read; the message goes on after the image's name.
    """
    classes: tuple[str, ...] | None = None
    """Names of the classes by the numbers of this file; None if the numbers are those of all files."""


class PackedSource(Source):
    """Source of images in large files, in the order of the files' names and of the images in each.

    In a folder, words in the names of the files say which are to train on and which to test on. A pattern of files is
    for training alone.

    Args:
        name: prefix and pattern.
    """

    sized = False
    quick_data = DataConfig(image_size=32)
    suffix: str
    """End of the files' names."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.prefix, self.pattern = split_name(name)

    def load(self, request: Request) -> tuple[PackedImages, PackedImages | None]:
        if request.data_dir is not None:
            raise DataError(
                f"data_dir {request.data_dir} names a second place beside {shown(self.name)}; leave out --data-dir, "
                f"or give {self.prefix}{request.data_dir}"
            )
        train_files, test_files = find_files(self.pattern, self.suffix)
        train = self._image_set(train_files, "train", request.skip_corrupt)
        if not test_files:
            return train, None
        test = self._image_set(test_files, "test", request.skip_corrupt, classes=train.classes)
        if train.labeled and (test.labels < 0).all():
            logger.warning("the images to test on of %s have no labels, and are left out", shown(self.name))
            return train, None
        return train, test

    @abstractmethod
    def _open(self, files: Sequence[RangeFile]) -> tuple[Store, list[Part]]:
        """Returns the store of these files, and the images of each, which have the store's numbers in this order."""

    @abstractmethod
    def _class_names(self, files: Sequence[RangeFile]) -> tuple[str, ...]:
        """Returns the names of the classes by number; none if they are not known."""

    def _image_set(
        self, names: Sequence[str], split: str, skip_corrupt: bool, *, classes: tuple[str, ...] | None = None
    ) -> PackedImages:
        whole = [name for name in names if os.path.isabs(name)]
        if 0 < len(whole) < len(names):
            other = next(name for name in names if not os.path.isabs(name))
            raise DataError(
                f"{shown(self.name)} names {shown(whole[0])}, which begins with /, and {shown(other)}, which does not; "
                "give all of them from / on"
            )
        files = [range_file(name) for name in names]
        store, parts = self._open(files)
        below = os.path.commonpath([os.path.dirname(shown(name)) for name in names])
        inside = [os.path.relpath(shown(part.file.name), below) for part in parts]
        paths = [f"{file}/{name}" for file, part in zip(inside, parts, strict=True) for name in part.names]
        if not paths:
            raise DataError(f"{shown(self.name)} holds no image ({few([shown(name) for name in names])})")
        named = _classes_of(parts, shown(self.name)) if classes is None else classes
        found = _numbered(self._examined(store, parts), parts, named, shown(self.name))
        drawn = sum(entry.problem == DRAWN for entry in found)
        if drawn:
            logger.warning("%s: left out as pictures that mnclglf drew: %d", shown(self.name), drawn)
        kept = kept_numbers(paths, found, shown(self.name), skip_corrupt=skip_corrupt)
        if not kept:
            raise DataError(f"{shown(self.name)} holds no image that can be used")
        labels = [found[number].label for number in kept]
        unlabeled = [number for number, label in zip(kept, labels, strict=True) if label == NO_LABEL]
        if unlabeled and len(unlabeled) < len(kept):
            raise DataError(f"{paths[unlabeled[0]]} has no label, and others have; give all of them one, or none")
        if classes is None:
            classes = named if named and max(labels) >= 0 else self._classes(files, max(labels) + 1)
        if max(labels) >= len(classes):
            if classes:
                raise DataError(
                    f"{shown(self.name)}: an image to test on has the label {max(labels)}, and the training images "
                    f"have classes 0 to {len(classes) - 1}; give both the same classes"
                )
            labels = [NO_LABEL] * len(labels)
        return PackedImages(
            name=shown(self.name),
            split=split,
            labels=np.array(labels, np.int64),
            classes=classes,
            store=store,
            members=np.array(kept, np.int64),
            **fields_of(paths, found, kept),
        )

    def _classes(self, files: Sequence[RangeFile], count: int) -> tuple[str, ...]:
        """Returns the names of at least `count` classes, else their numbers."""
        if count > MOST_CLASSES:
            raise DataError(
                f"{shown(self.name)}: the label {count - 1} is no number of a class; number the classes from 0 on"
            )
        if count == 0:
            return ()
        named = self._class_names(files)
        return named if len(named) >= count else tuple(map(str, range(count)))

    def _examined(self, store: Store, parts: Sequence[Part]) -> list[Examined]:
        """Returns the findings about all images; those about each file are kept in a file of their own."""
        found: list[Examined] = []
        for part in parts:
            first = len(found)

            def look(number: int, part: Part = part, first: int = first) -> Examined:
                stamp, place = part.file.stamp._replace(size=part.sizes[number]), store.place(first + number)
                seen = look_at(lambda: store.read(first + number, near=True), place, stamp)
                try:
                    return seen if seen.problem else replace(seen, label=part.label(number))
                except UnreachableError:
                    raise
                except DataError as error:
                    return Examined(stamp, problem=str(error))

            found += examine(
                part.names,
                [part.file.stamp._replace(size=size) for size in part.sizes],
                look,
                index=cache_dir(self.prefix[:-1]) / f"{part.file.key}.npz",
                place=shown(part.file.name),
                threads=store.most_threads,
            )
        return found


def _classes_of(parts: Sequence[Part], place: str) -> tuple[str, ...]:
    """Returns the names of the classes of all files, sorted where files differ; none if no file names them."""
    named = {part.classes for part in parts if part.classes is not None}
    classes = named.pop() if len(named) == 1 else tuple(sorted({name for names in named for name in names}))
    if len(classes) > MOST_CLASSES:
        raise DataError(f"{place} has {len(classes):,} different labels, as {classes[0]!r:.40}, which are no classes")
    return classes


def _numbered(found: list[Examined], parts: Sequence[Part], classes: tuple[str, ...], place: str) -> list[Examined]:
    """Returns the findings with the numbers of labels among all classes, where a file has numbers of its own.

    Raises:
        DataError: a label is none of the classes.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    made: list[Examined] = []
    for part in parts:
        inside = found[len(made) : len(made) + len(part.names)]
        if part.classes is None or part.classes == classes or not classes:
            made += inside
            continue
        for name, entry in zip(part.names, inside, strict=True):
            text = part.classes[entry.label] if entry.label != NO_LABEL else None
            if text is not None and text not in numbers:
                raise DataError(
                    f"{place}: {shown(part.file.name)}/{name} has the label {text!r:.40}, which no training image has; "
                    "give both the same classes"
                )
            made.append(entry if text is None else replace(entry, label=numbers[text]))
    return made
