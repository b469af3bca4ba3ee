"""Images of a torch Dataset: any object with a length and numbered items.

Items are read by calling the Dataset, never by two threads of one process at once: nothing says that it could bear
that. A loader with more than one thread takes that many worker processes, as torch's DataLoader has them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mnclglf.data.decoding import to_rgb
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageSet, Statistics, moments_of_image, statistics_of

logger = logging.getLogger(__name__)

IMAGE_KEYS, LABEL_KEYS = ("image", "img"), ("label", "labels")
_CHANNELS = (1, 3, 4)
_BATCH, _MANY = 64, 2000  # items read at once; number of items from which on workers read them at the start
_SMALLEST_SIDE = 8  # pixels, as of files


class Items(Protocol):
    """A map-style Dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Item(NamedTuple):
    """An item as it is used."""

    pixels: NDArray[np.uint8]  # [H, W, 3]
    label: int | None


class _UnfitError(ValueError):
    """An item is of no form that is known; the message goes on after "item 5"."""


def read_item(items: Items, index: int, name: str) -> Item:
    """Returns an item of a Dataset: an image, alone, or as the first of a tuple (image, label), or of a dict.

    Raises:
        DataError: it cannot be read, or is no such item.
    """
    try:
        image, label = _parts(items[index])
        return Item(pixels_of(image), _label(label))
    except _UnfitError as error:
        raise DataError(f"{name}: item {index} {error}") from error
    except Exception as error:  # of the Dataset's own code, or of an image whose file is read only now
        raise DataError(
            f"{name}: item {index} cannot be read ({type(error).__name__}: {error}); repair it, or leave it out with "
            "torch.utils.data.Subset"
        ) from error


def _parts(item: Any) -> tuple[Any, Any]:
    """Returns image and label of an item; the label is None if it has none."""
    if isinstance(item, Mapping):
        fields = cast("Mapping[str, Any]", item)
        image = next((fields[key] for key in IMAGE_KEYS if key in fields), None)
        if image is None:
            raise _UnfitError(
                f"is a dict of {', '.join(map(str, fields))}: name the image {' or '.join(IMAGE_KEYS)}, and the label "
                f"{' or '.join(LABEL_KEYS)}"
            )
        return image, next((fields[key] for key in LABEL_KEYS if key in fields), None)
    if isinstance(item, tuple | list):
        parts = cast("Sequence[Any]", item)
        if not 1 <= len(parts) <= 2:
            raise _UnfitError(f"is a tuple of {len(parts)}: give the image, or (image, label)")
        return parts[0], parts[1] if len(parts) == 2 else None
    return item, None


def pixels_of(image: Any) -> NDArray[np.uint8]:
    """Returns an image as uint8 [H, W, 3].

    Args:
        image: a PIL image, not turned by its EXIF; or a tensor or array, uint8 or uint16, [H, W], [C, H, W] or
            [H, W, C], of 1, 3 or 4 channels, of which the fourth is dropped. Where both orders fit, a tensor is
            [C, H, W] and an array [H, W, C].

    Raises:
        ValueError: it is none of these; the message goes on after "item 5".
    """
    if isinstance(image, Image.Image):
        return _checked_side(to_rgb(image))
    if not hasattr(image, "shape") or not hasattr(image, "dtype"):
        raise _UnfitError(f"is a {type(image).__name__}: give a PIL image, or a uint8 tensor or array")
    is_tensor = not isinstance(image, np.ndarray)
    kind = str(image.dtype).removeprefix("torch.")
    if kind not in ("uint8", "uint16"):
        raise _UnfitError(
            f"is {kind}: give uint8 from 0 to 255. Leave transforms that make floats out (ToTensor, ToDtype, "
            "Normalize; PILToTensor keeps uint8): the views are made and normalized here"
        )
    pixels = np.asarray(image.cpu() if is_tensor and hasattr(image, "cpu") else image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise _UnfitError(f"has shape {pixels.shape}: give [H, W], [C, H, W] or [H, W, C]")
    first, last = pixels.shape[0] in _CHANNELS, pixels.shape[2] in _CHANNELS
    if not (first or last):
        raise _UnfitError(f"has shape {pixels.shape}: none of its ends has 1, 3 or 4 channels")
    if first and (is_tensor or not last):
        pixels = pixels.transpose(1, 2, 0)
    if kind == "uint16":
        pixels = np.rint(pixels / 257).astype(np.uint8)
    pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[..., :3]
    return _checked_side(np.ascontiguousarray(pixels))


def _checked_side(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if min(pixels.shape[:2]) < _SMALLEST_SIDE:
        raise _UnfitError(
            f"is {pixels.shape[0]} x {pixels.shape[1]} pixels, smaller than {_SMALLEST_SIDE}; leave it out"
        )
    return pixels


def _label(label: Any) -> int | None:
    """Returns a label as an int of at least 0; None if there is none."""
    if label is None:
        return None
    value = label.item() if getattr(label, "shape", None) == () else label
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _UnfitError(f"has the label {value!r}: give the number of its class, from 0 on, or no label")
    return value


class _Reader:
    """What a worker process reads: an item, or the message of its DataError, as errors would come with tracebacks."""

    def __init__(self, items: Items, name: str) -> None:
        self.items, self.name = items, name

    def __getitem__(self, index: int) -> Item | str:
        try:
            return read_item(self.items, index, self.name)
        except DataError as error:
            return str(error)


def read_batches(items: Items, plan: Iterable[NDArray[np.int64]], *, name: str, workers: int) -> Iterator[list[Item]]:
    """Yields the items of each batch of indices, in order.

    Args:
        items: the Dataset.
        plan: indices of each batch.
        name: name of the images, for messages.
        workers: worker processes that read ahead, at most one per CPU that this process may use; with at most 1 this
            process reads when a batch is taken.

    Raises:
        DataError: an item cannot be read.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers, cpus)
    if workers <= 1:
        for indices in plan:
            yield [read_item(items, index, name) for index in indices.tolist()]
        return
    import torch
    from torch.utils.data import DataLoader

    batches = (indices.tolist() for indices in plan)
    loader: Any = DataLoader(
        cast(Any, _Reader(items, name)),
        batch_sampler=cast(Any, batches),
        num_workers=workers,
        collate_fn=_as_they_are,
        generator=torch.Generator(),  # of its own: the run's random numbers stay as they are
    )
    for batch in loader:
        problem = next((item for item in batch if isinstance(item, str)), None)
        if problem is not None:
            raise DataError(problem)
        yield batch


def _as_they_are(items: list[Any]) -> list[Any]:
    return items


@dataclass(frozen=True, kw_only=True)
class ImageItems(ImageSet):
    """Images of any size, read from a Dataset when they are needed."""

    items: Items
    """The Dataset."""
    indices: NDArray[np.int64]
    """Index [n] in the Dataset of each image."""
    heights: NDArray[np.int32]
    """Heights [n] in pixels."""
    widths: NDArray[np.int32]
    """Widths [n] in pixels."""
    moments: NDArray[np.float64]
    """Moments [n, 2, 3]: mean of each channel and of its square, for pixels scaled to [0, 1]."""
    digests: NDArray[np.uint8]
    """SHA-256 [n, 32] of each image's size and pixels."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    """Held while this process reads an item."""

    def _picked(self, rows: NDArray[np.int64]) -> Self:
        return replace(
            self,
            indices=self.indices[rows],
            heights=self.heights[rows],
            widths=self.widths[rows],
            moments=self.moments[rows],
            digests=self.digests[rows],
        )

    def sizes(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return self.heights[rows], self.widths[rows]

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        return [self.pixels(row) for row in rows.tolist()]

    def read_ahead(self, plan: Iterable[NDArray[np.int64]], threads: int) -> Iterator[list[NDArray[np.uint8]]]:
        indices = (self.indices[rows] for rows in plan)
        for batch in read_batches(self.items, indices, name=self.name, workers=threads):
            yield [item.pixels for item in batch]

    def pixels(self, row: int) -> NDArray[np.uint8]:
        with self.lock:
            return read_item(self.items, int(self.indices[row]), self.name).pixels

    def statistics(self) -> Statistics:
        return statistics_of(self.moments)

    def fingerprint(self) -> str:
        return f"items:{hashlib.sha256(self.labels.tobytes() + self.digests.tobytes()).hexdigest()}"


class Found(NamedTuple):
    """What was seen of all items of a Dataset."""

    labels: list[int | None]
    heights: NDArray[np.int32]  # [n]
    widths: NDArray[np.int32]  # [n]
    moments: NDArray[np.float64]  # [n, 2, 3]
    digests: NDArray[np.uint8]  # [n, 32]
    images: NDArray[np.uint8] | None  # [n, H, W, 3] of small images of one size


def examine(items: Items, name: str, *, most_side: int, most_bytes: int, workers: int) -> Found:
    """Reads every item once, and keeps the pixels if all have one size of at most `most_side` and fit `most_bytes`.

    Raises:
        DataError: an item cannot be read or is no image; some have labels and some not; or an item differs when it is
            read again, so that its size and its place in a fingerprint would say nothing.
    """
    count = len(items)
    if count > _MANY:
        logger.warning("reading %s items of %s, once in this program, to check them", f"{count:,}", name)
    since = time.monotonic()
    plan = (np.arange(start, min(start + _BATCH, count)) for start in range(0, count, _BATCH))
    labels: list[int | None] = []
    sizes = np.zeros((2, count), np.int32)
    moments, digests = np.zeros((count, 2, 3)), np.zeros((count, 32), np.uint8)
    kept: list[NDArray[np.uint8]] | None = []
    for batch in read_batches(items, plan, name=name, workers=workers if count > _MANY else 1):
        for pixels, label in batch:
            row = len(labels)
            labels.append(label)
            sizes[:, row] = pixels.shape[:2]
            moments[row] = moments_of_image(pixels)
            digests[row] = np.frombuffer(digest_of(pixels), np.uint8)
            if kept is not None:
                one_size = not kept or kept[0].shape == pixels.shape
                fits = max(pixels.shape) <= most_side and pixels.nbytes * count <= most_bytes
                if one_size and fits:
                    kept.append(pixels)
                else:
                    kept = None
    if count > _MANY:
        logger.warning("read them in %.0f s", time.monotonic() - since)
    missing = [row for row, label in enumerate(labels) if label is None]
    if missing and len(missing) < count:
        raise DataError(f"{name}: item {missing[0]} has no label, and others have; give all of them one, or none")
    images = np.stack(kept) if kept else None
    return Found(labels, sizes[0], sizes[1], moments, digests, images)


def digest_of(pixels: NDArray[np.uint8]) -> bytes:
    """Returns the SHA-256 of an image's size and pixels."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()


def changed_item(items: Items, found: Found, name: str, *, sample: int) -> int | None:
    """Returns the index of an item that is another than it was when it was examined; None if none is.

    Reads `sample` evenly spaced items.

    Raises:
        DataError: an item cannot be read.
    """
    if len(items) != len(found.labels):
        return min(len(items), len(found.labels))
    for index in np.unique(np.linspace(0, len(items) - 1, min(sample, len(items)), dtype=np.int64)).tolist():
        pixels, label = read_item(items, index, name)
        if digest_of(pixels) != found.digests[index].tobytes() or label != found.labels[index]:
            return index
    return None
