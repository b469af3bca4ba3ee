"""Fashion-MNIST: four IDX files, gzipped or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mnclglf.config import DataConfig
from mnclglf.data.archives import read_idx
from mnclglf.data.errors import damaged
from mnclglf.data.images import ImageArray, to_color
from mnclglf.data.sources.source import Request, Source, cache_dir, download, missing

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # folder of Debian's package dataset-fashion-mnist

_CLASSES = (
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


class FashionMnist(Source):
    """60,000 + 10,000 images of clothes, 28 x 28."""

    name = "fashion_mnist"
    quick_data = DataConfig(image_size=16, train_images=10_000)

    def load(self, request: Request) -> tuple[ImageArray, ImageArray]:
        folders = [request.data_dir] if request.data_dir else [cache_dir(self.name), DEBIAN]
        places = [place for folder in folders for place in (folder, folder / "FashionMNIST" / "raw")]
        found = next(filter(None, (_files(place) for place in places)), None)
        if found is None and request.download:
            _download(folders[0])
            found = _files(folders[0])
        if found is None:
            raise missing(
                "Fashion-MNIST",
                "train-images-idx3-ubyte.gz and its three companions",
                places,
                request,
                otherwise=", or install Debian's package: apt install dataset-fashion-mnist",
            )
        return _read(found, "train", 60_000), _read(found, "t10k", 10_000)


def _files(folder: Path) -> dict[str, Path] | None:
    """Returns the four files by stem, gzipped or not; None unless all are there."""
    stems = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    found = {stem: path for stem in stems for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()}
    return found if len(found) == len(stems) else None


def _read(files: dict[str, Path], part: str, count: int) -> ImageArray:
    arrays: list[NDArray[np.uint8]] = []
    for stem, shape in ((f"{part}-images-idx3-ubyte", (count, 28, 28)), (f"{part}-labels-idx1-ubyte", (count,))):
        array = read_idx(files[stem])
        if array.shape != shape:
            raise damaged(files[stem], f"holds an array {array.shape} where {shape} is expected")
        arrays.append(array)
    images, labels = arrays
    if labels.max() >= len(_CLASSES):
        raise damaged(files[f"{part}-labels-idx1-ubyte"], f"has label {labels.max()}, above {len(_CLASSES) - 1}")
    return ImageArray(
        name="fashion_mnist",
        split="train" if part == "train" else "test",
        images=to_color(images),
        labels=labels.astype(np.int64),
        classes=_CLASSES,
    )


def _download(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST

    for name, md5 in FashionMNIST.resources:
        download([mirror + name for mirror in FashionMNIST.mirrors], folder / name, md5)
