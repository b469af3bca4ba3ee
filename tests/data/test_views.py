from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from scipy.stats import ks_2samp
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from mnclglf.config import ViewConfig
from mnclglf.data.views import ViewParameters, blur_window, draw_parameters, whole_views

DRAWS = 20_000
# Kolmogorov-Smirnov distance that two samples of this size from one distribution pass with probability 1e-6:
# sqrt(ln(2 / 1e-6) / 2) * sqrt(2 / DRAWS)
KS_LIMIT = math.sqrt(math.log(2 / 1e-6) / 2) * math.sqrt(2 / DRAWS)
OFF = ViewConfig(flip_probability=0, jitter_probability=0, gray_probability=0, blur_probability=0)


def draw(config: ViewConfig, height: int = 32, width: int = 32) -> ViewParameters:
    return draw_parameters(5, 2, np.arange(DRAWS), 1, config, height, width)


def ks_distance(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Returns the Kolmogorov-Smirnov distance of two samples."""
    result: Any = ks_2samp(ours, theirs)
    return result.statistic


def assert_rate(share: float, probability: float) -> None:
    assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / DRAWS)  # five deviations


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (24, 80)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    torch.manual_seed(0)
    image, config = torch.empty(3, height, width), ViewConfig()
    theirs = np.array(
        [
            transforms.RandomResizedCrop.get_params(image, list(config.crop_scale), list(config.crop_ratio))
            for _ in range(DRAWS)
        ]
    )
    p = draw(config, height, width)
    ours = np.stack([p.top, p.left, p.crop_height, p.crop_width], axis=1)
    statistics = {
        "area": lambda box: box[:, 2] * box[:, 3],
        "ratio": lambda box: box[:, 3] / box[:, 2],
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
        "bottom": lambda box: box[:, 0] + box[:, 2],
        "right": lambda box: box[:, 1] + box[:, 3],
    }
    for name, statistic in statistics.items():
        distance = ks_distance(statistic(ours), statistic(theirs))
        assert distance < KS_LIMIT, f"{name}: {distance:.4f}"


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10), (9, 9)])
def test_the_fallback_is_torchvisions_central_crop(height: int, width: int) -> None:
    # a ratio of 1.2 to 1.3 and the whole area fit none of these images
    config = ViewConfig(crop_scale=(1, 1), crop_ratio=(1.2, 1.3))
    expected = transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), [1, 1], [1.2, 1.3])
    p = draw_parameters(0, 0, np.arange(4), 0, config, height, width)
    for row in range(4):
        assert (p.top[row], p.left[row], p.crop_height[row], p.crop_width[row]) == expected


def test_factors_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(OFF, jitter_probability=1, rotation_degrees=15, blur_probability=1)
    jitter = transforms.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
    # Pairs of numbers, as get_params takes them, though it is annotated for lists.
    ranges: tuple[Any, ...] = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = np.array([transforms.ColorJitter.get_params(*ranges)[1:] for _ in range(DRAWS)], dtype=np.float64)
    p = draw(config)
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert ks_distance(getattr(p, name), theirs[:, column]) < KS_LIMIT, name
    angles = [transforms.RandomRotation.get_params([-15, 15]) for _ in range(DRAWS)]
    assert ks_distance(p.angle, angles) < KS_LIMIT
    sigmas = [transforms.GaussianBlur.get_params(*config.blur_sigma) for _ in range(DRAWS)]
    assert ks_distance(p.sigma, sigmas) < KS_LIMIT


def test_each_operation_is_as_frequent_as_configured() -> None:
    config = ViewConfig(flip_probability=0.3, jitter_probability=0.7, gray_probability=0.2, blur_probability=0.6)
    config = dataclasses.replace(config, solarize_probability=0.1)
    p = draw(config)
    assert_rate(p.flip.mean(), 0.3)
    assert_rate(p.gray.mean(), 0.2)
    assert_rate((p.sigma > 0).mean(), 0.6)
    assert_rate(p.solarize.mean(), 0.1)
    changed = p.brightness != 1
    assert_rate(changed.mean(), 0.7)
    for column in (p.contrast != 1, p.saturation != 1, p.hue != 0):  # all four together or none, as RandomApply
        np.testing.assert_array_equal(column, changed)


def test_what_is_switched_off_is_off_and_what_is_certain_is_on() -> None:
    p = draw(OFF)
    for name in ("brightness", "contrast", "saturation"):
        assert (getattr(p, name) == 1).all()
    for name in ("angle", "hue", "sigma", "flip", "gray", "solarize"):
        assert not getattr(p, name).any()
    p = draw(ViewConfig(flip_probability=1, gray_probability=1, blur_probability=1, jitter_probability=1))
    assert p.flip.all()
    assert p.gray.all()
    assert (p.sigma > 0).all()
    assert (p.hue != 0).all()


def test_no_two_numbers_are_related() -> None:
    """Checks for random words that are used twice, which would show as a correlation."""
    probabilities = {f.name: 0.5 for f in dataclasses.fields(ViewConfig) if f.name.endswith("_probability")}
    config = dataclasses.replace(ViewConfig(rotation_degrees=10), **probabilities)
    p = draw(dataclasses.replace(config, jitter_probability=1, blur_probability=1))
    columns = {name: column.astype(np.float64) for name, column in p.arrays().items()}
    # where a crop lies depends on its size, and its height on its width: compare where in its room it lies
    columns["top"] = (columns["top"] + 0.5) / (33 - columns["crop_height"])
    columns["left"] = (columns["left"] + 0.5) / (33 - columns["crop_width"])
    area, ratio = columns["crop_height"] * columns["crop_width"], columns.pop("crop_height") / columns.pop("crop_width")
    values = np.stack([*columns.values(), area, np.log(ratio)])
    related = np.corrcoef(values) - np.eye(len(values))
    # five deviations, and 0.02 for what rounding to whole pixels leaves between the size and the place of a crop
    assert np.abs(related).max() < 5 / math.sqrt(DRAWS) + 0.02


@pytest.mark.parametrize("changed", ["seed", "epoch", "indices", "view"])
def test_every_part_of_the_counter_matters(changed: str) -> None:
    base = {"seed": 1, "epoch": 2, "indices": np.arange(DRAWS), "view": 0}
    other = base | {changed: base[changed] + 1}
    one, two = (draw_parameters(**where, config=ViewConfig(), height=32, width=32) for where in (base, other))
    both = (one.brightness != 1) & (two.brightness != 1)
    if changed == "indices":  # the neighbor's numbers, nothing else
        np.testing.assert_array_equal(one.brightness[1:], two.brightness[:-1])
    assert abs(np.corrcoef(one.brightness[both], two.brightness[both])[0, 1]) < 5 / math.sqrt(both.sum())


def test_seeds_that_differ_above_32_bits_differ() -> None:
    one, two = (draw_parameters(seed, 0, np.arange(9), 0, ViewConfig(), 32, 32) for seed in (7, 7 + 2**32))
    assert not np.array_equal(one.top, two.top)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    low=st.floats(0.01, 1),
    ratio=st.floats(0.1, 1),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
)
def test_crops_lie_inside_the_image(height: int, width: int, low: float, ratio: float, seed: int, epoch: int) -> None:
    config = ViewConfig(crop_scale=(low, 1), crop_ratio=(ratio, 1 / ratio))
    p = draw_parameters(seed, epoch, np.arange(50), 0, config, height, width)
    assert (p.top >= 0).all()
    assert (p.left >= 0).all()
    assert (p.crop_height >= 1).all()
    assert (p.crop_width >= 1).all()
    assert (p.top + p.crop_height <= height).all()
    assert (p.left + p.crop_width <= width).all()


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), view=st.integers(0, 5))
def test_a_view_does_not_depend_on_its_batch(rows: list[int], view: int) -> None:
    config = ViewConfig(rotation_degrees=20)
    together = draw_parameters(3, 4, rows, view, config, 32, 48)
    views = draw_parameters(3, 4, rows * 2, [view] * len(rows) + [view + 1] * len(rows), config, 32, 48)
    for number, row in enumerate(rows):
        alone = draw_parameters(3, 4, [row], view, config, 32, 48).arrays()
        for name, column in alone.items():
            assert column[0] == together.arrays()[name][number] == views.arrays()[name][number]


def test_columns_have_their_stated_types() -> None:
    p = draw(ViewConfig())
    for name in ("top", "left", "crop_height", "crop_width"):
        assert getattr(p, name).dtype == np.int32
    for name in ("angle", "brightness", "contrast", "saturation", "hue", "sigma"):
        assert getattr(p, name).dtype == np.float32
    assert p.flip.dtype == p.gray.dtype == p.solarize.dtype == np.bool_
    assert {len(column) for column in p.arrays().values()} == {DRAWS} == {len(p)}


@pytest.mark.parametrize(
    ("side", "kernel"), [(8, 5), (32, 5), (59, 5), (61, 7), (64, 7), (79, 7), (81, 9), (96, 9), (99, 9), (224, 23)]
)
def test_blur_kernel_is_the_odd_number_nearest_a_tenth(side: int, kernel: int) -> None:
    assert blur_window(ViewConfig(), side) == kernel
    assert blur_window(ViewConfig(blur_kernel=3), side) == 3


def test_whole_views_normalize_and_keep_the_image() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
    images.flags.writeable = False  # as read from a file
    mean, std = np.array([0.1, 0.2, 0.3], np.float32), np.array([0.5, 0.25, 0.125], np.float32)
    made = whole_views(images, 12, mean, std, torch.float32)
    assert made.is_contiguous(memory_format=torch.channels_last)
    expected = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(made.numpy(), expected, rtol=0, atol=1e-5)  # float32 of values up to 8


@pytest.mark.parametrize("shape", [(20, 20), (9, 9), (20, 30)])
def test_whole_views_resize(shape: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, *shape, 3), dtype=np.uint8)
    made = whole_views(images, 12, np.zeros(3, np.float32), np.ones(3, np.float32), torch.bfloat16)
    assert made.shape == (3, 3, 12, 12)
    assert made.dtype == torch.bfloat16
    assert made.is_contiguous(memory_format=torch.channels_last)
    pixels = torch.tensor(images).permute(0, 3, 1, 2)
    expected = F.resize(pixels, [12], F.InterpolationMode.BICUBIC, antialias=True)  # of the shorter side
    expected = F.center_crop(expected, [12, 12]) / 255
    torch.testing.assert_close(made.float(), expected, rtol=2**-8, atol=0)  # bfloat16's rounding


def test_whole_views_of_images_of_many_sizes() -> None:
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((20, 31), (12, 12), (50, 9), (8, 200))]
    made = whole_views(images, 12, zero, one, torch.float32)
    assert made.shape == (4, 3, 12, 12)
    for view, image in zip(made, images, strict=True):
        assert torch.equal(view, whole_views(image[None], 12, zero, one, torch.float32)[0])
    np.testing.assert_allclose(made[1].permute(1, 2, 0).numpy(), images[1] / 255, atol=1e-6)


def test_each_image_has_the_crop_of_its_own_size() -> None:
    heights, widths = np.array([32, 5, 300, 64, 17]), np.array([32, 200, 20, 64, 31])
    together = draw_parameters(3, 1, np.arange(5), 2, ViewConfig(), heights, widths)
    for row, (height, width) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
        alone = draw_parameters(3, 1, [row], 2, ViewConfig(), height, width).arrays()
        for name, column in together.arrays().items():
            assert column[row] == alone[name][0], name
    assert (together.top + together.crop_height <= heights).all()
    assert (together.left + together.crop_width <= widths).all()
    assert (together.crop_height >= 1).all()
    assert (together.crop_width >= 1).all()


def test_a_blur_that_is_wider_than_the_view_is_refused() -> None:
    with pytest.raises(ValueError, match="blur_kernel 33 is too wide for views of side 16"):
        blur_window(ViewConfig(blur_kernel=33), 16)
    with pytest.raises(ValueError, match="blur_kernel 4 must be odd"):
        ViewConfig(blur_kernel=4)
