"""Random choices of the training images, the validation images and the labels that are used.

Each is a permutation by Philox (philox.py), so it depends only on the number of images, their labels and a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mnclglf.config import DataConfig, require
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageSet
from mnclglf.data.philox import LABEL_STREAM, SPLIT_STREAM, permutation

SPLIT_SEED = 0  # not the run's seed: every run trains and tests on the same images
TEST_SHARE = 0.2  # of each class, where a data set to evaluate on has no test images

Images = TypeVar("Images", bound=ImageSet)


def split_train(train: Images, data: DataConfig) -> tuple[Images, Images]:
    """Returns the images to pre-train on and the validation images held out of them.

    The choice depends only on the number of images, not on a run's seed. The validation images stay the same when
    train_images changes.

    Raises:
        ValueError: the two together are more than there are images.
    """
    held_out = data.validation_images
    kept = len(train) - held_out if data.train_images is None else data.train_images
    require(
        kept >= 1 and held_out + kept <= len(train),
        f"{train.name} has {len(train)} training images: train_images {data.train_images} and validation_images "
        f"{held_out} do not fit; lower --validation-images, or --train-images to at most "
        f"{max(1, len(train) - held_out)}",
    )
    # epoch=1, as epoch 0 draws the test set of data sets that have none (sources/digits.py)
    order = permutation(len(train), seed=SPLIT_SEED, stream=SPLIT_STREAM, epoch=1)
    train_rows = np.sort(order[held_out : held_out + kept])
    held_out_rows = np.sort(order[:held_out])
    return train.subset(train_rows), replace(train.subset(held_out_rows), split="validation")


def draw_test(images: Images) -> tuple[Images, Images]:
    """Returns the images without, and with, a fixed random choice of test images: TEST_SHARE of each class.

    Each class keeps at least one image to train on and, if it has two, gives one to test on. The choice depends only on
    the labels.

    Raises:
        DataError: no class has two images.
    """
    order = permutation(len(images), seed=SPLIT_SEED, stream=SPLIT_STREAM, epoch=2)  # split_train takes epoch 1
    rows = _rows_of_each_class(
        order, images.labels, len(images.classes), lambda count: min(count - 1, max(1, round(TEST_SHARE * count)))
    )
    if len(rows) == 0:
        raise DataError(
            f"{images.name} has no test images, and no class of two images to draw one from; add images, or give the "
            "folder subfolders train and val"
        )
    train = np.setdiff1d(np.arange(len(images)), rows)
    return images.subset(train), replace(images.subset(rows), split="test")


def with_labels(images: Images, share: float, *, seed: int) -> Images:
    """Returns the images whose labels may be used: a fraction `share` of each class, at least one image per class.

    A smaller share is a subset of a larger one.

    Raises:
        DataError: a class has no image.
    """
    if share == 1:
        return images
    counts = np.bincount(images.labels, minlength=len(images.classes))
    for name, count in zip(images.classes, counts.tolist(), strict=True):
        if count == 0:
            raise DataError(
                f"{images.name} has no training image of class {name} to take a label from; train on more images, or "
                "evaluate with all labels"
            )
    return images.subset(
        draw_labeled(images.labels, len(images.classes), lambda count: max(1, round(share * count)), seed=seed)
    )


def per_class_draws(
    labels: NDArray[np.int64], *, classes: int, per_class: int, draws: int, seed: int
) -> list[NDArray[np.int64]]:
    """Returns `draws` random choices of `per_class` rows of each class, each int64 [classes * per_class], sorted.

    Raises:
        ValueError: per_class or draws is below 1, or a class has fewer than `per_class` rows.
    """
    if per_class < 1 or draws < 1:
        raise ValueError(f"per_class {per_class} and draws {draws} must both be at least 1")
    for label, count in enumerate(np.bincount(labels, minlength=classes)[:classes].tolist()):
        if count < per_class:
            raise ValueError(f"class {label} has {count} train images, fewer than per_class {per_class}")
    return [draw_labeled(labels, classes, lambda _: per_class, seed=seed, draw=draw) for draw in range(draws)]


def draw_labeled(
    labels: NDArray[np.int64], classes: int, wanted: Callable[[int], int], *, seed: int, draw: int = 0
) -> NDArray[np.int64]:
    """Returns the sorted rows of a random choice of `wanted(count)` rows of each class that has `count` of them.

    Args:
        labels: [n], 0 to classes - 1; other values are not chosen.
        classes: number of classes.
        wanted: function from the size of a class to the rows to take from it.
        seed: seed of the choice.
        draw: number of the choice; different numbers give independent choices.
    """
    return _rows_of_each_class(
        permutation(len(labels), seed=seed, stream=LABEL_STREAM, epoch=draw), labels, classes, wanted
    )


def _rows_of_each_class(
    order: NDArray[np.int64], labels: NDArray[np.int64], classes: int, wanted: Callable[[int], int]
) -> NDArray[np.int64]:
    """Returns, sorted, the first `wanted(count)` rows in `order` of each class that has `count` of them."""
    members = [order[labels[order] == label] for label in range(classes)]
    return np.sort(np.concatenate([rows[: max(0, wanted(len(rows)))] for rows in members]))
