"""object:CLASS: a torch Dataset of the Python program that is running, and a second one to test on or none."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from mnclglf.config import FOLDER, OBJECT, DataConfig
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageArray, ImageSet
from mnclglf.data.items import LABEL_KEYS, Found, ImageItems, Items, changed_item, examine
from mnclglf.data.sources.source import Request, Source

logger = logging.getLogger(__name__)

MOST_SIDE, MOST_BYTES = 64, 2 * 2**30  # of images that are kept in memory, as those of other data sets are
MOST_CLASSES = 2**16
_SAMPLE = 64  # items that are read again, to see whether they are as they were


class _Part(NamedTuple):
    """A Dataset and what was seen of it."""

    items: Items
    found: Found


class ObjectSource(Source):
    """Source of a Dataset and one to test on, or None.

    Args:
        train: images to train on.
        test: images to test on.
        workers: processes that read many items at the start.
        before: the source of the same name that this program had before; what it found of the same objects is used.
    """

    needs_files = False

    def __init__(self, train: object, test: object, *, workers: int, before: ObjectSource | None) -> None:
        self.name = name_of_object(train)
        self.parts = [
            _part(given, self.name, workers, () if before is None else before.parts)
            for given in (train, test)
            if given is not None
        ]
        self.sized = self.parts[0].found.images is not None
        self.quick_data = DataConfig(image_size=16 if self.sized else 32)

    def check_folder(self, data_dir: Path | None) -> None:
        if data_dir is not None:
            raise DataError(f"data_dir {data_dir} has no effect: {self.name} is in memory; leave out data_dir")

    def load(self, request: Request) -> tuple[ImageSet, ImageSet | None]:
        train, *tests = self.parts
        classes = class_names(train.items, train.found.labels, self.name)
        images = self._images(train, "train", classes)
        if not tests:
            return images, None
        labels = [label for label in tests[0].found.labels if label is not None]
        if classes and (not labels or max(labels) >= len(classes)):
            raise DataError(
                f"{self.name}: test_dataset has {'the label ' + str(max(labels)) if labels else 'no labels'}, and the "
                f"training images have classes 0 to {len(classes) - 1}; give both the same classes"
            )
        return images, self._images(tests[0], "test", classes)

    def _images(self, part: _Part, split: str, classes: tuple[str, ...]) -> ImageSet:
        found = part.found
        labels = np.array([-1 if label is None or not classes else label for label in found.labels], np.int64)
        about: dict[str, Any] = dict(name=self.name, split=split, labels=labels, classes=classes)
        if found.images is not None and self.sized:
            return ImageArray(images=found.images, **about)
        return ImageItems(
            items=part.items,
            indices=np.arange(len(labels)),
            heights=found.heights,
            widths=found.widths,
            moments=found.moments,
            digests=found.digests,
            **about,
        )


_GIVEN: dict[str, ObjectSource] = {}


def give_object(train: object, test: object = None, *, workers: int = 1) -> str:
    """Makes a Dataset known to this program, with one to test on; returns its name, object:CLASS.

    Every item is read once in a program. When the same object is given again, 64 evenly spaced items are read and
    compared, and all of them only if one has changed.

    Raises:
        DataError: it has no length or no items by number, or an item cannot be used.
    """
    name = name_of_object(train)
    _GIVEN[name] = ObjectSource(train, test, workers=workers, before=_GIVEN.get(name))
    return name


def given_object(name: str) -> ObjectSource:
    """Returns the source of a name of `give_object`.

    Raises:
        DataError: this program was not given the Dataset.
    """
    if name not in _GIVEN:
        raise DataError(
            f"{name} is a Dataset object of a Python program, and is not here: give it again, as in "
            "mnclglf.train(dataset=..., out=RUN) or mnclglf.evaluate(RUN, dataset=..., test_dataset=...); for the "
            "command line make it a source of a package (docs/howto/any-dataset.md)"
        )
    return _GIVEN[name]


def name_of_object(items: object) -> str:
    """Returns object:CLASS."""
    return f"{OBJECT}{type(items).__name__}"


def _part(given: object, name: str, workers: int, before: Sequence[_Part]) -> _Part:
    """Examines a Dataset, unless that was done and nothing has changed."""
    if isinstance(given, type):
        raise DataError(
            f"{given.__name__} is a class: give an object of it, as {given.__name__}(...), or a subclass of "
            "mnclglf.data.sources.source.Source"
        )
    iterable = any(kind.__name__ == "IterableDataset" for kind in type(given).__mro__)
    if iterable or not (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
        raise DataError(
            f"{name} has no items by number, or no length: give a map-style Dataset, with __getitem__ and __len__; "
            f"image files in a folder are {FOLDER}PATH, also those of an IterableDataset that you write there"
        )
    items = cast(Items, given)
    try:
        count = len(items)
    except Exception as error:  # of the Dataset's own code
        raise DataError(
            f"{name} has no length ({type(error).__name__}: {error}); give a map-style Dataset, whose __len__ returns "
            "the number of its items"
        ) from error
    if count == 0:
        raise DataError(f"{name} holds no images; give it some")
    known = next((part for part in before if part.items is items), None)
    if known is not None and changed_item(items, known.found, name, sample=_SAMPLE) is None:
        return known
    found = examine(items, name, most_side=MOST_SIDE, most_bytes=MOST_BYTES, workers=workers)
    changed = changed_item(items, found, name, sample=_SAMPLE)
    if changed is not None:
        raise DataError(
            f"{name}: item {changed} is another image each time it is read; leave random transforms out: the views are "
            "made here"
        )
    return _Part(items, found)


def class_names(items: object, labels: Sequence[int | None], name: str) -> tuple[str, ...]:
    """Returns the names of the classes: those that the Dataset (or the one in a Subset) has, else their numbers.

    Raises:
        DataError: a label is too large to be the number of a class.
    """
    present = [label for label in labels if label is not None]
    if not present:
        return ()
    count = max(present) + 1
    if count > MOST_CLASSES:
        raise DataError(f"{name}: the label {count - 1} is no number of a class; number the classes from 0 on")
    at: Any = items
    while at is not None:
        features: Any = getattr(at, "features", None)  # of Hugging Face
        columns: list[Any] = (
            [features[key] for key in LABEL_KEYS if key in features] if isinstance(features, Mapping) else []
        )
        named = getattr(at, "classes", None) or next((getattr(column, "names", None) for column in columns), None)
        if isinstance(named, list | tuple) and len(cast("Sequence[Any]", named)) >= count:
            return tuple(map(str, cast("Sequence[Any]", named)))
        at = getattr(at, "dataset", None)
    return tuple(map(str, range(count)))
