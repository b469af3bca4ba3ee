from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mnclglf.config import DataConfig
from mnclglf.data.datasets import load_dataset
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageArray, view_side
from mnclglf.data.splits import split_train


def image_set(count: int, height: int = 6, width: int = 6) -> ImageArray:
    rng = np.random.default_rng(0)
    return ImageArray(
        name="made",
        split="train",
        images=rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8),
        labels=rng.integers(0, 3, count),
        classes=("a", "b", "c"),
    )


@pytest.mark.parametrize(
    "images", [np.zeros((3, 6, 6), np.uint8), np.zeros((3, 6, 6, 1), np.uint8), np.zeros((2, 6, 6, 3), np.uint8),
               np.zeros((3, 6, 6, 3), np.float32)]
)  # fmt: skip
def test_an_image_set_of_another_shape_is_refused(images: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"uint8 \(3, H, W, 3\) is expected"):
        ImageArray(name="n", split="train", images=images, labels=np.zeros(3, np.int64), classes=("a",))


def test_channel_statistics_are_those_of_the_pixels() -> None:
    images = image_set(20).images // np.array([1, 2, 3], dtype=np.uint8)
    images_of = replace(image_set(20), images=images)
    mean, std = images_of.statistics()
    scaled = images.astype(np.float64).reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, scaled.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(std, scaled.std(axis=0), rtol=1e-6)
    assert mean.dtype == std.dtype == np.float32
    constant = replace(image_set(2), images=np.full((2, 4, 4, 3), 9, np.uint8))
    assert constant.statistics()[1] == pytest.approx([1 / 255] * 3)


@pytest.mark.parametrize(
    ("height", "width", "size", "side"), [(28, 28, None, 28), (27, 27, None, 28), (48, 31, None, 32), (28, 28, 16, 16)]
)
def test_view_side(height: int, width: int, size: int | None, side: int) -> None:
    assert view_side(image_set(2, height, width), size) == side


def test_a_choice_of_a_choice_knows_where_its_images_stand_in_the_whole():
    kept, _ = split_train(load_dataset("digits")[0], DataConfig(train_images=50, validation_images=10))
    picked = kept.subset([3, 1])
    assert isinstance(picked, ImageArray)
    pixels, _ = load_digits(return_X_y=True)
    published = np.reshape(pixels, (-1, 8, 8))[picked.published_rows(np.arange(2))]
    np.testing.assert_array_equal(np.rint(published * (255 / 16)), picked.images[..., 0])


def test_subset_keeps_images_with_labels() -> None:
    images = image_set(10)
    rows = np.array([7, 2, 2])
    part = images.subset(rows)
    np.testing.assert_array_equal(part.images, images.images[rows])
    np.testing.assert_array_equal(part.labels, images.labels[rows])
    assert (part.classes, len(part)) == (images.classes, 3)
