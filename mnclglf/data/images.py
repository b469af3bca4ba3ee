"""Sets of images with their labels, in memory or in files."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from mnclglf.data.decoding import Kind, decode_image, read_file, size_of_file
from mnclglf.data.errors import DataError

Pixels = NDArray[np.uint8] | list[NDArray[np.uint8]]
"""Images as one array [n, H, W, 3], or as a list of [H, W, 3]."""

Statistics = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Mean [3] and standard deviation [3] of images scaled to [0, 1]."""

logger = logging.getLogger(__name__)

_FILES_FORM = "files-2:"  # begins a fingerprint of files by their contents; the first form, by their sizes, has none
_COUNTED_IMAGES = 1000  # images counted at once for statistics: numpy's bincount needs eight times their memory


@dataclass(frozen=True, kw_only=True)
class ImageSet(ABC):
    """n images with their labels."""

    name: str
    """Name of the data set."""
    split: str
    """Part of the data set: train, validation or test."""
    labels: NDArray[np.int64]
    """[n], 0 to len(classes) - 1; -1 for images without labels."""
    classes: tuple[str, ...]
    """Name of each class; empty for images without labels."""
    origin: NDArray[np.int64] | None = None
    """Row [n] of each image in the set that this one was picked from; None for a whole set."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labeled(self) -> bool:
        """True where the images have labels."""
        return bool(self.classes)

    def subset(self, rows: ArrayLike) -> Self:
        """Returns the images at these row numbers, in this order."""
        picked = np.asarray(rows, dtype=np.int64)
        return replace(self._picked(picked), labels=self.labels[picked], origin=self.published_rows(picked))

    def published_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the rows of these images in the data set as it was read, before any choice of images."""
        return rows if self.origin is None else self.origin[rows]

    def names(self, rows: NDArray[np.int64]) -> list[str] | list[int]:
        """Returns what a user can find these images by: their numbers in the data set, or their paths."""
        return self.published_rows(rows).tolist()

    @abstractmethod
    def _picked(self, rows: NDArray[np.int64]) -> Self:
        """Returns a copy with the images at these rows; the caller sets labels and origin."""

    @abstractmethod
    def sizes(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Returns heights and widths of these images in pixels, [m] each."""

    @abstractmethod
    def read(self, rows: NDArray[np.int64]) -> Pixels:
        """Returns these images, each uint8 [H, W, 3]; one array [m, H, W, 3] where they are in memory.

        Raises:
            DataError: an image cannot be read.
        """

    def read_ahead(self, plan: Iterable[NDArray[np.int64]], threads: int) -> Iterator[Pixels]:
        """Yields what `read` returns of each batch of rows, in order; images that are slow to read are read ahead.

        Raises:
            DataError: an image cannot be read.
        """
        return (self.read(rows) for rows in plan)

    def to_shuffle(self, window: int | None) -> Self:
        """Returns these images, to be read in random order, or so many neighbors at a time."""
        return self

    @abstractmethod
    def pixels(self, row: int) -> NDArray[np.uint8]:
        """Returns the image at this row, uint8 [H, W, 3].

        Raises:
            DataError: the image cannot be read.
        """

    @abstractmethod
    def statistics(self) -> Statistics:
        """Returns mean [3] and standard deviation [3] of the images scaled to [0, 1]; deviations are at least 1/255."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Returns a hash of the images, by which a run resumes only on those that it started with."""

    def matches(self, fingerprint: str) -> bool:
        """Returns whether these are the images of a fingerprint, also of one in the form of an earlier version."""
        return fingerprint == self.fingerprint()


@dataclass(frozen=True, kw_only=True)
class ImageArray(ImageSet):
    """Images of one size, in memory or mapped into it."""

    images: NDArray[np.uint8]
    """Pixels [n, H, W, 3]."""

    def __post_init__(self) -> None:
        n = len(self.labels)
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[::3] != (n, 3):
            raise DataError(
                f"{self.name} {self.split}: images are {self.images.dtype} {self.images.shape} for {n} labels; "
                f"uint8 ({n}, H, W, 3) is expected"
            )

    def _picked(self, rows: NDArray[np.int64]) -> Self:
        whole = np.array_equal(rows, np.arange(len(self)))  # no copy then, to save memory
        return replace(self, images=self.images if whole else self.images[rows], labels=self.labels[rows])

    def sizes(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        height, width = self.images.shape[1:3]
        return np.full(len(rows), height, np.int32), np.full(len(rows), width, np.int32)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.images[rows]

    def pixels(self, row: int) -> NDArray[np.uint8]:
        return self.images[row]

    def statistics(self) -> Statistics:
        counts = np.zeros((3, 256))
        for start in range(0, len(self), _COUNTED_IMAGES):
            pixels = self.images[start : start + _COUNTED_IMAGES].reshape(-1, 3).T
            counts += [np.bincount(channel, minlength=256) for channel in pixels]
        return _mean_and_deviation(*moments_of(counts))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.images.shape).encode() + self.labels.tobytes())
        for start in range(0, len(self), _COUNTED_IMAGES):
            digest.update(self.images[start : start + _COUNTED_IMAGES].tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class EncodedImages(ImageSet):
    """Images of any size, as the contents of image files, which are read on demand."""

    paths: tuple[str, ...]
    """Names [n] by which a user finds the images; of files their paths, relative to the root."""
    heights: NDArray[np.int32]
    """Heights [n] in pixels, upright by the EXIF orientation."""
    widths: NDArray[np.int32]
    """Widths [n] in pixels."""
    file_sizes: NDArray[np.int64]
    """Sizes of the contents [n] in bytes."""
    moments: NDArray[np.float64]
    """Moments [n, 2, 3]: mean of each channel and of its square, for pixels scaled to [0, 1]."""
    orientations: NDArray[np.uint8] | None = None
    """EXIF orientation of each file [n], 1 to 8; None if all are upright."""
    digests: tuple[bytes, ...] = ()
    """SHA-256 of each file's contents [n]; empty where the files were not read."""
    kinds: tuple[Kind, ...] = ()
    """What each file holds [n]; empty where the files were not read."""
    corrupt: tuple[str, ...] = ()
    """Files that were left out as they cannot be used, each with the reason."""

    @abstractmethod
    def contents(self, row: int) -> bytes:
        """Returns the contents of the image file at this row.

        Raises:
            DataError: it cannot be read.
        """

    @abstractmethod
    def place(self, row: int) -> str:
        """Returns where the image at this row is, for messages."""

    def names(self, rows: NDArray[np.int64]) -> list[str]:
        return [self.paths[row] for row in rows]

    def _picked(self, rows: NDArray[np.int64]) -> Self:
        return replace(
            self,
            paths=tuple(self.paths[row] for row in rows),
            heights=self.heights[rows],
            widths=self.widths[rows],
            file_sizes=self.file_sizes[rows],
            moments=self.moments[rows],
            orientations=None if self.orientations is None else self.orientations[rows],
            digests=tuple(self.digests[row] for row in rows) if self.digests else (),
            kinds=tuple(self.kinds[row] for row in rows) if self.kinds else (),
        )

    def sizes(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return self.heights[rows], self.widths[rows]

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without the GIL
            return list(threads.map(self.pixels, rows))

    def pixels(self, row: int) -> NDArray[np.uint8]:
        pixels = decode_image(self.contents(row), self.place(row)).pixels
        if pixels.shape[:2] != (self.heights[row], self.widths[row]):
            found, known = pixels.shape[:2], (self.heights[row], self.widths[row])
            raise self._changed(row, f"is {found[0]} x {found[1]} pixels, and was {known[0]} x {known[1]}")
        return pixels

    def check(self, row: int) -> None:  # for images in files of their own
        """Raises DataError if the image at this row can no longer be read, as far as its file tells without reading."""

    def _changed(self, row: int, how: str) -> DataError:
        return DataError(f"{self.place(row)} {how} when the run started; put the old file back, or start the run anew")

    def statistics(self) -> Statistics:
        return statistics_of(self.moments)

    def fingerprint(self) -> str:
        """Returns a hash of names below the root, labels and contents of the files; the root may be another."""
        return f"{_FILES_FORM}{self._hash(b''.join(self.digests))}"

    def matches(self, fingerprint: str) -> bool:
        if fingerprint.startswith(_FILES_FORM):
            return fingerprint == self.fingerprint()
        logger.warning(
            "%s was compared with the images of an earlier version's run by names, labels and sizes of the files: that "
            "version did not look at pixels",
            self.name,
        )
        return fingerprint == self._hash(self.file_sizes.tobytes())

    def _hash(self, contents: bytes) -> str:
        names = "\0".join(self.paths).encode(errors="surrogateescape")
        return hashlib.sha256(names + self.labels.tobytes() + contents).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ImageFiles(EncodedImages):
    """Images in files of their own."""

    root: Path
    """Folder of the files."""
    modified: NDArray[np.int64] | None = None
    """Times of the last change of each file [n] in nanoseconds; None if they are not known."""

    def contents(self, row: int) -> bytes:
        data = read_file(self.root / self.paths[row])
        self._check_size(row, len(data))
        if self._is_touched(row) and self.digests and hashlib.sha256(data).digest() != self.digests[row]:
            raise self._changed(row, "has other contents than")
        return data

    def check(self, row: int) -> None:
        self._check_size(row, size_of_file(self.root / self.paths[row]))
        if self._is_touched(row):
            self.contents(row)

    def _picked(self, rows: NDArray[np.int64]) -> Self:
        return replace(super()._picked(rows), modified=None if self.modified is None else self.modified[rows])

    def _is_touched(self, row: int) -> bool:
        """Returns whether a file may have changed, as its time is another one."""
        if self.modified is None:
            return False
        with suppress(OSError):  # gone since it was read
            return os.stat(self.root / self.paths[row]).st_mtime_ns != self.modified[row]
        return False

    def _check_size(self, row: int, size: int) -> None:
        if size != self.file_sizes[row]:
            raise self._changed(row, f"has {size:,} bytes, and had {self.file_sizes[row]:,}")

    def place(self, row: int) -> str:
        return str(self.root / self.paths[row])


def moments_of(counts: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the mean [3] of pixels scaled to [0, 1] and of their squares [3], from histograms [3, 256]."""
    levels, shares = np.arange(256) / 255, counts / counts.sum(axis=1, keepdims=True)
    return shares @ levels, shares @ levels**2


def moments_of_image(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Returns the moments [2, 3] of an image [H, W, 3]: means of each channel and its square, for pixels in [0, 1]."""
    counts = np.array(Image.fromarray(pixels).histogram(), dtype=np.float64).reshape(3, 256)
    return np.stack(moments_of(counts))


def statistics_of(moments: NDArray[np.float64]) -> Statistics:
    """Returns mean [3] and standard deviation [3] of images by their moments [n, 2, 3]."""
    return _mean_and_deviation(*moments.mean(axis=0))


def _mean_and_deviation(mean: NDArray[np.float64], mean_square: NDArray[np.float64]) -> Statistics:
    """Returns mean [3] and deviation [3]; a deviation is at least 1 / 255, so that it can divide a constant channel."""
    deviation = np.sqrt(np.maximum(mean_square - mean**2, 0))
    return mean.astype(np.float32), np.maximum(deviation, 1 / 255).astype(np.float32)


def to_color(gray: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns gray [n, H, W] as [n, H, W, 3] with three equal channels."""
    return np.repeat(gray[..., None], 3, axis=3)


def view_side(images: ImageSet, image_size: int | None) -> int:
    """Returns the side of a view in pixels: image_size, else the images' shorter side made even; 224 for files."""
    if image_size is not None:
        return image_size
    if not isinstance(images, ImageArray):
        return 224
    side = min(images.images.shape[1:3])
    return side + side % 2
