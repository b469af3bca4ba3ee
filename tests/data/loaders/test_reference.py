"""Tests of the parameters' meaning, on images whose views are known without torchvision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mnclglf.config import ViewConfig
from mnclglf.data.loaders.reference import render_view
from mnclglf.data.views import ViewParameters, draw_parameters

SIDE = 16
OFF = ViewConfig(
    interpolation="bilinear", flip_probability=0, jitter_probability=0, gray_probability=0, blur_probability=0
)
CUBIC = ViewConfig()
HALF = float(np.float32(0.5 / 255))  # half a level


def parameters(**changes: object) -> ViewParameters:
    """Returns the parameters of one view: the whole image with everything off except `changes`."""
    p = draw_parameters(0, 0, [0], 0, OFF, SIDE, SIDE).arrays()
    whole = {"top": 0, "left": 0, "crop_height": SIDE, "crop_width": SIDE}
    arrays: dict[str, Any] = {
        name: np.array([(whole | changes).get(name, value[0])], value.dtype) for name, value in p.items()
    }
    return ViewParameters(**arrays)


def render(image: np.ndarray, side: int = SIDE, **changes: object) -> np.ndarray:
    """Returns the view as [side, side, 3] in [0, 1]."""
    mean, std = np.zeros(3, np.float32), np.ones(3, np.float32)
    view = render_view(image, parameters(**changes), 0, side=side, config=OFF, mean=mean, std=std)
    assert view.shape == (3, side, side)
    return view.permute(1, 2, 0).numpy()


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def test_nothing_changes_nothing(image: np.ndarray) -> None:
    np.testing.assert_allclose(render(image), image / 255, atol=1e-6)


def test_rotation_is_counter_clockwise_and_fills_with_black(image: np.ndarray) -> None:
    np.testing.assert_allclose(render(image, angle=90), np.rot90(image) / 255, atol=HALF)
    white = np.full_like(image, 255)
    turned = render(white, angle=45)
    assert turned[0, 0].max() == 0
    assert turned[SIDE // 2, SIDE // 2].min() == 1


def test_crop_takes_the_named_box(image: np.ndarray) -> None:
    box = {"top": 3, "left": 5, "crop_height": 8, "crop_width": 8}
    np.testing.assert_allclose(render(image, side=8, **box), image[3:11, 5:13] / 255, atol=1e-6)


def test_crop_is_stretched_along_the_right_axes() -> None:
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[4:6, 2:14] = 255
    stretched = render(image, top=4, left=0, crop_height=2, crop_width=SIDE)
    assert (stretched[:, 3:13] == 1).all()
    assert stretched[:, 0].max() == 0


def test_rotation_comes_before_the_crop(image: np.ndarray) -> None:
    box = {"top": 3, "left": 5, "crop_height": 8, "crop_width": 8}
    np.testing.assert_allclose(render(image, side=8, angle=90, **box), np.rot90(image)[3:11, 5:13] / 255, atol=HALF)


def test_flip_swaps_left_and_right_of_the_crop(image: np.ndarray) -> None:
    box = {"top": 3, "left": 5, "crop_height": 8, "crop_width": 8}
    np.testing.assert_allclose(render(image, side=8, flip=True, **box), image[3:11, 12:4:-1] / 255, atol=1e-6)


def test_brightness_contrast_and_saturation_are_clamped_in_turn(image: np.ndarray) -> None:
    luma = np.array([0.2989, 0.587, 0.114])
    pixels = np.minimum(image / 255 * 1.4, 1)
    pixels = np.clip(1.4 * pixels - 0.4 * (pixels @ luma).mean(), 0, 1)
    pixels = np.clip(1.3 * pixels - 0.3 * (pixels @ luma)[..., None], 0, 1)
    np.testing.assert_allclose(render(image, brightness=1.4, contrast=1.4, saturation=1.3), pixels, atol=1e-5)


@pytest.mark.parametrize(("turns", "becomes"), [(1 / 3, [0, 1, 0]), (-1 / 3, [0, 0, 1]), (0.5, [0, 1, 1])])
def test_hue_turns_red_towards_green(turns: float, becomes: list[int]) -> None:
    red = np.zeros((SIDE, SIDE, 3), np.uint8)
    red[..., 0] = 255
    np.testing.assert_allclose(render(red, hue=turns), np.broadcast_to(becomes, red.shape), atol=1e-5)


def test_gray_is_the_luma_after_the_other_colors(image: np.ndarray) -> None:
    pixels = np.minimum(image / 255 * 1.4, 1) @ np.array([0.2989, 0.587, 0.114])
    grayed = render(image, brightness=1.4, gray=True)
    np.testing.assert_allclose(grayed, np.repeat(pixels[..., None], 3, axis=-1), atol=1e-5)


def test_blur_is_a_gaussian_of_sigma_pixels_in_a_window_of_five() -> None:
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[8, 8] = 255
    weights = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 1.3**2))
    weights /= weights.sum()
    expected = np.zeros((SIDE, SIDE, 3))
    expected[6:11, 6:11] = np.outer(weights, weights)[..., None]
    np.testing.assert_allclose(render(image, sigma=1.3), expected, atol=1e-6)


def test_the_last_step_normalizes(image: np.ndarray) -> None:
    mean, std = np.array([0.1, 0.2, 0.3], np.float32), np.array([0.5, 0.25, 0.125], np.float32)
    view = render_view(image, parameters(), 0, side=SIDE, config=CUBIC, mean=mean, std=std)
    np.testing.assert_allclose(view.permute(1, 2, 0), (image / 255 - mean) / std, atol=1e-5)
