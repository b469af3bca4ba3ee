"""Sets of labelled images, in memory or in files, and the choices that are made among them."""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import ExifTags, Image

from mnclglf.config import DataConfig
from mnclglf.data.archives import DataError
from mnclglf.data.philox import LABEL_STREAM, SPLIT_STREAM, permutation

Pixels = NDArray[np.uint8] | list[NDArray[np.uint8]]
"""Images: one array [n, H, W, 3], or [H, W, 3] each."""

SPLIT_SEED = 0  # not the run's: every run trains and tests on the same images
FORMATS = ("JPEG", "PNG", "WEBP")
_TURNS = {  # by EXIF's orientation; Pillow's own way takes XMP's too, which DALI does not look at
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_COUNTED_IMAGES = 1000  # at once, for statistics: numpy counts in eight times the memory


@dataclass(frozen=True, kw_only=True)
class ImageSet(ABC):
    """n images with their labels."""

    name: str
    """Of the data set."""
    split: str
    """train, validation or test."""
    labels: NDArray[np.int64]
    """[n], 0 to len(classes) - 1; -1 where nobody labelled them."""
    classes: tuple[str, ...]
    """What each label is called; empty where nobody labelled them."""
    origin: NDArray[np.int64] | None = None
    """[n], the row of each image in the set that this one was picked from; None where it is whole."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        return bool(self.classes)

    def subset(self, rows: ArrayLike) -> Self:
        """The images at these row numbers, in this order."""
        picked = np.asarray(rows, dtype=np.int64)
        return replace(self._picked(picked), labels=self.labels[picked], origin=self.published_rows(picked))

    def published_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the images at these row numbers stand in the data set as it was read, before any choice of images."""
        return rows if self.origin is None else self.origin[rows]

    def names(self, rows: NDArray[np.int64]) -> list[str] | list[int]:
        """What a user finds these images by: their numbers in the data set, or their paths."""
        return self.published_rows(rows).tolist()

    @abstractmethod
    def _picked(self, rows: NDArray[np.int64]) -> Self:
        """A copy with the images at these rows; labels and origin are the caller's."""

    @abstractmethod
    def sizes(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Heights and widths of these images in pixels, [m] each."""

    @abstractmethod
    def read(self, rows: NDArray[np.int64]) -> Pixels:
        """These images, each uint8 [H, W, 3]; one array [m, H, W, 3] where they are in memory.

        Raises:
            DataError: one of them cannot be read.
        """

    @abstractmethod
    def pixels(self, row: int) -> NDArray[np.uint8]:
        """The image at this row, uint8 [H, W, 3].

        Raises:
            DataError: it cannot be read.
        """

    @abstractmethod
    def statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean [3] and standard deviation [3] of the images scaled to [0, 1], a deviation at least one level."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes with the images: a run resumes on those that it started with."""


@dataclass(frozen=True, kw_only=True)
class ImageArray(ImageSet):
    """Images of one size, in memory or mapped into it."""

    images: NDArray[np.uint8]
    """[n, H, W, 3]."""

    def __post_init__(self) -> None:
        n = len(self.labels)
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[::3] != (n, 3):
            raise DataError(
                f"{self.name} {self.split}: images are {self.images.dtype} {self.images.shape} for {n} labels; "
                f"uint8 ({n}, H, W, 3) is expected"
            )

    def _picked(self, rows: NDArray[np.int64]) -> Self:
        whole = np.array_equal(rows, np.arange(len(self)))  # then a copy would take memory for nothing
        return replace(self, images=self.images if whole else self.images[rows], labels=self.labels[rows])

    def sizes(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        height, width = self.images.shape[1:3]
        return np.full(len(rows), height, np.int32), np.full(len(rows), width, np.int32)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.images[rows]

    def pixels(self, row: int) -> NDArray[np.uint8]:
        return self.images[row]

    def statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
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
    """Images of any sizes, in files that are read when they are needed."""

    root: Path
    """Folder of the files."""
    paths: tuple[str, ...]
    """[n], relative to root."""
    heights: NDArray[np.int32]
    """[n] in pixels, upright as the EXIF orientation says."""
    widths: NDArray[np.int32]
    """[n] in pixels."""
    file_sizes: NDArray[np.int64]
    """[n] in bytes."""
    moments: NDArray[np.float64]
    """[n, 2, 3]: mean of each channel and of its square, of pixels scaled to [0, 1]."""

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
        )

    def sizes(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return self.heights[rows], self.widths[rows]

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without Python's lock
            return list(threads.map(self.pixels, rows))

    def pixels(self, row: int) -> NDArray[np.uint8]:
        return read_image(self.root / self.paths[row])

    def statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        mean, mean_square = self.moments.mean(axis=0)
        return _mean_and_deviation(mean, mean_square)

    def fingerprint(self) -> str:
        names = "\0".join(self.paths).encode(errors="surrogateescape")
        return hashlib.sha256(names + self.labels.tobytes() + self.file_sizes.tobytes()).hexdigest()


def moments_of(counts: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [3] of pixels scaled to [0, 1] and of their squares [3], from how often each level is there, [3, 256]."""
    levels, shares = np.arange(256) / 255, counts / counts.sum(axis=1, keepdims=True)
    return shares @ levels, shares @ levels**2


def _mean_and_deviation(
    mean: NDArray[np.float64], mean_square: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Both [3]; a deviation is at least one level, 1 / 255, so that a constant channel can be divided by it."""
    deviation = np.sqrt(np.maximum(mean_square - mean**2, 0))
    return mean.astype(np.float32), np.maximum(deviation, 1 / 255).astype(np.float32)


def to_colour(gray: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, H, W] as [n, H, W, 3] with three equal channels."""
    return np.repeat(gray[..., None], 3, axis=3)


def read_image(path: Path) -> NDArray[np.uint8]:
    """The image of a JPEG, PNG or WebP file, uint8 [H, W, 3], upright as its EXIF orientation says.

    Gray becomes three equal channels, transparency is dropped, 16 bits become 8.

    Raises:
        DataError: it cannot be read to its end, or has more pixels than Pillow trusts.
    """
    try:
        # From memory: a file that is read in place reserves what the length of a chunk in it says, up to 2 GB. And of
        # these formats alone: Pillow would run Ghostscript on others, and DALI does not know them.
        with Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS) as image:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width * image.height:,} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            turn = _TURNS.get(exif.get(ExifTags.Base.Orientation, 1))
            upright = image if turn is None else image.transpose(turn)
            if upright.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would cut them off at 255
                levels = np.asarray(upright, dtype=np.float64) / 257
                upright = Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8))
            return np.array(upright.convert("RGB"))
    except Exception as error:  # a damaged file makes Pillow raise anything: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error


Images = TypeVar("Images", bound=ImageSet)


def split_train(train: Images, data: DataConfig) -> tuple[Images, Images]:
    """The images to pre-train on and the validation images that are held out of them.

    The choice is random and fixed: it depends on the number of images alone, not on a run's seed, and the validation
    images stay the same when train_images changes.

    Raises:
        DataError: the two together are more than there are.
    """
    held_out = data.validation_images
    kept = len(train) - held_out if data.train_images is None else data.train_images
    if kept < 1 or held_out + kept > len(train):
        raise DataError(
            f"{train.name} has {len(train)} training images: train_images {data.train_images} and validation_images "
            f"{held_out} do not fit; lower one of them"
        )
    order = permutation(len(train), seed=SPLIT_SEED, stream=SPLIT_STREAM, epoch=1)  # not a data set's own choice
    rows = np.sort(order[held_out : held_out + kept]), np.sort(order[:held_out])
    return train.subset(rows[0]), replace(train.subset(rows[1]), split="validation")


def with_labels(images: Images, share: float, *, seed: int) -> Images:
    """The images whose labels may be used: this share of every class, at least one image of each.

    The choice is random and depends on the labels and the seed alone; a smaller share is a part of a larger one.

    Raises:
        DataError: a class has no image.
    """
    if share == 1:
        return images
    order = permutation(len(images), seed=seed, stream=LABEL_STREAM)
    rows: list[NDArray[np.int64]] = []
    for label, name in enumerate(images.classes):
        members = order[images.labels[order] == label]
        if len(members) == 0:
            raise DataError(
                f"{images.name} has no training image of class {name} to take a label from; train on more images, or "
                "evaluate with all labels"
            )
        rows.append(members[: max(1, round(share * len(members)))])
    return images.subset(np.sort(np.concatenate(rows)))


def view_side(images: ImageSet, image_size: int | None) -> int:
    """Side of a view in pixels: image_size, or the images' shorter side rounded up to even; 224 for files."""
    if image_size is not None:
        return image_size
    if not isinstance(images, ImageArray):
        return 224
    side = min(images.images.shape[1:3])
    return side + side % 2
