"""Sets of images with their labels, in memory or in files."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mnclglf.data.decoding import read_image
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
class ImageFiles(ImageSet):
    """Images of any size, in files that are read on demand."""

    root: Path
    """Folder of the files."""
    paths: tuple[str, ...]
    """Paths [n], relative to root."""
    heights: NDArray[np.int32]
    """Heights [n] in pixels, upright by the EXIF orientation."""
    widths: NDArray[np.int32]
    """Widths [n] in pixels."""
    file_sizes: NDArray[np.int64]
    """Sizes of the files [n] in bytes."""
    moments: NDArray[np.float64]
    """Moments [n, 2, 3]: mean of each channel and of its square, for pixels scaled to [0, 1]."""
    orientations: NDArray[np.uint8] | None = None
    """EXIF orientation of each file [n], 1 to 8; None if all are upright."""
    digests: tuple[bytes, ...] = ()
    """SHA-256 of each file's contents [n]; empty where the files were not read."""

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
        )

    def sizes(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return self.heights[rows], self.widths[rows]

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without the GIL
            return list(threads.map(self.pixels, rows))

    def pixels(self, row: int) -> NDArray[np.uint8]:
        return read_image(self.root / self.paths[row])

    def statistics(self) -> Statistics:
        mean, mean_square = self.moments.mean(axis=0)
        return _mean_and_deviation(mean, mean_square)

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


def moments_of(counts: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the mean [3] of pixels scaled to [0, 1] and of their squares [3], from histograms [3, 256]."""
    levels, shares = np.arange(256) / 255, counts / counts.sum(axis=1, keepdims=True)
    return shares @ levels, shares @ levels**2


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
