"""Tests of DALI's and the resident loader's views against torchvision's, image by image, in levels of 1 / 255.

After the resize both compute in float32, so a change of color alone agrees to rounding. Rotation and resize end in
whole levels, where a last bit makes one level. Two things differ by design and are bounded here: DALI repeats an
image's edge where torchvision leaves outside pixels out of an antialiased or cubic sum, and torchvision's cubic kernel
rounds and clamps to bytes between its two passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from mnclglf.config import Interpolation, LoaderName, ViewConfig
from mnclglf.data.images import ImageArray
from mnclglf.data.loaders import make_loader
from mnclglf.recipes import VIEWS

pytest.importorskip("nvidia.dali", reason="the extra dali-cuda13 is not installed")
from mnclglf.data.loaders.dali import view_pipeline

EXACT = 0.01  # levels: float32 rounding of values up to 255
WHOLE = 1.01  # levels: one, from rounding to bytes, and EXACT
EDGE = 4  # pixels beside the edge that a cubic kernel, twice enlarged, or a linear one and the blur reach from outside
NONE = ViewConfig(
    crop_scale=(1, 1),
    crop_ratio=(1, 1),
    interpolation="bilinear",
    flip_probability=0,
    jitter_probability=0,
    gray_probability=0,
    blur_probability=0,
)
SILENT = replace(NONE, jitter_probability=1, brightness=0, contrast=0, saturation=0, hue=0)
CROP = replace(NONE, crop_scale=(0.2, 1), crop_ratio=(3 / 4, 4 / 3))
OPERATIONS = ("flip", "jitter", "gray", "blur", "solarize")
COLORS = {
    "brightness": replace(SILENT, brightness=0.4),
    "contrast": replace(SILENT, contrast=0.4),
    "saturation": replace(SILENT, saturation=0.4),
    "hue": replace(SILENT, hue=0.1),
    "any hue": replace(SILENT, hue=0.5),
    "strongest jitter": replace(SILENT, brightness=1, contrast=1, saturation=1, hue=0.5),
    "some jitter": replace(NONE, jitter_probability=0.5),
    "gray": replace(NONE, gray_probability=0.5),
    "flip": replace(NONE, flip_probability=0.5),
    "blur": replace(NONE, blur_probability=0.5),
    # At the threshold both sides of it meet (127.5 levels), so a rounding there is not amplified: EXACT holds.
    "solarize": replace(NONE, solarize_probability=0.5),
    "all after the crop": replace(NONE, **{f"{name}_probability": 0.5 for name in OPERATIONS}),
}


def render(images: np.ndarray, view: ViewConfig, side: int, backend: LoaderName, device: str = "cpu") -> torch.Tensor:
    """Returns two views per image in levels, [2 n, 3, side, side], on the CPU."""
    labels = np.zeros(len(images), np.int64)
    loader = make_loader(
        ImageArray(name="photos", split="train", images=images, labels=labels, classes=("any",)),
        view,
        views=2,
        side=side,
        batch_size=len(images),
        seed=3,
        dtype=torch.float32,
        device=torch.device(device),
        backend=backend,
        threads=2,
    )
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (loader.mean, loader.std))
    return torch.cat([pixels.cpu() * std + mean for pixels in loader.render(np.arange(len(images)), epoch=1)]) * 255


def both(images: np.ndarray, view: ViewConfig, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    return render(images, view, side, "dali"), render(images, view, side, "reference")


def assert_changed(views: torch.Tensor, images: np.ndarray, view: ViewConfig, side: int) -> None:
    """Asserts that the operation under test changes at least a fifth of the views."""
    unchanged = render(images, replace(NONE, interpolation=view.interpolation), side, "reference")
    assert ((views - unchanged).abs().amax(dim=(1, 2, 3)) > 2).float().mean() > 0.2


@pytest.mark.parametrize("color", [True, False])
@pytest.mark.parametrize("name", COLORS)
def test_what_follows_the_resize_is_exact(photos: Callable[..., np.ndarray], name: str, color: bool) -> None:
    images = photos(32, 32, color=color)
    ours, truth = both(images, COLORS[name], 32)
    assert (ours - truth).abs().max() < EXACT
    if color or name not in ("saturation", "hue", "any hue", "gray"):  # which leave a gray image as it is
        assert_changed(truth, images, COLORS[name], 32)


def test_hue_is_exact_for_pure_tied_and_gray_colors() -> None:
    levels = [0, 1, 127, 128, 254, 255]
    colors = np.array(np.meshgrid(levels, levels, levels), dtype=np.uint8).reshape(3, -1).T  # 216 colors
    images = np.stack([np.roll(np.resize(colors, (16, 16, 3)), shift, axis=0) for shift in range(16)])
    ours, truth = both(images, COLORS["any hue"], 16)
    assert (ours - truth).abs().max() < EXACT


@pytest.mark.parametrize("size", [32, 31])
def test_rotation_agrees_to_a_level(photos: Callable[..., np.ndarray], size: int) -> None:
    images, view = photos(32, size), replace(NONE, rotation_degrees=45)
    ours, truth = both(images, view, size)
    difference = (ours - truth).abs()
    assert difference.max() < WHOLE
    assert (difference > EXACT).float().mean() < 0.002  # sums that end within a bit of a half level are rare
    assert_changed(truth, images, view, size)


@pytest.mark.parametrize("color", [True, False])
@pytest.mark.parametrize(("size", "side"), [(32, 32), (28, 32), (28, 64)])
def test_enlarging_bilinear_crops_agree_to_a_level(
    photos: Callable[..., np.ndarray], size: int, side: int, color: bool
) -> None:
    images = photos(32, size, color=color)
    ours, truth = both(images, CROP, side)
    # a crop that is larger than the view would be shrunk: none is here
    assert (ours - truth).abs().max() < WHOLE
    assert_changed(truth, images, CROP, side)


@pytest.mark.parametrize("size", [28, 32])
def test_shrinking_bilinear_crops_agree_to_a_level_off_the_edge(photos: Callable[..., np.ndarray], size: int) -> None:
    images = photos(32, size)
    ours, truth = both(images, CROP, 16)
    difference = (ours - truth).abs()
    assert difference[..., 1:-1, 1:-1].max() < WHOLE
    assert difference.max() < 16  # an outside pixel weighs at most a quarter of a sum, and edges are smooth
    assert difference.mean() < 0.3
    assert_changed(truth, images, CROP, 16)


@pytest.mark.parametrize(("size", "side"), [(32, 32), (28, 64), (32, 16)])
def test_cubic_crops_agree_but_for_the_rounding_between_passes(
    photos: Callable[..., np.ndarray], size: int, side: int
) -> None:
    images, view = photos(32, size), replace(CROP, interpolation="bicubic")
    ours, truth = both(images, view, side)
    difference = (ours - truth).abs()
    inner = difference[..., EDGE:-EDGE, EDGE:-EDGE]
    assert (inner > WHOLE).float().mean() < 0.003
    assert difference.max() < 12  # a sum that overshoots by a tenth is clamped once or twice
    assert difference.mean() < 0.2
    assert_changed(truth, images, view, side)


@pytest.mark.parametrize("color", [True, False])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "side"), [(32, 32), (28, 32), (32, 16)])
def test_the_whole_chain_agrees_for_every_image(
    photos: Callable[..., np.ndarray], size: int, side: int, interpolation: Interpolation, color: bool
) -> None:
    view = ViewConfig(rotation_degrees=15, interpolation=interpolation)
    ours, truth = both(photos(48, size, color=color), view, side)
    difference = (ours - truth).abs()
    # one level of the resize grows by brightness, contrast and saturation, 1.4 each, and by hue where two channels are
    # nearly equal: 3 levels are rare off the edge, and the mean stays that of the resize
    assert difference.mean() < 0.3
    assert (difference[..., EDGE:-EDGE, EDGE:-EDGE] > 3).float().mean() < 0.001
    assert difference.mean(dim=(1, 2, 3)).max() < 2
    # another image, view or parameter would be tens of levels away
    assert (truth - truth.roll(1, dims=0)).abs().mean(dim=(1, 2, 3)).min() > 5


def test_views_that_are_not_square_images(photos: Callable[..., np.ndarray]) -> None:
    images = photos(16, 40)[:, :28]
    ours, truth = both(images, replace(CROP, rotation_degrees=20, crop_scale=(0.2, 0.5)), 32)
    assert (ours - truth).abs().max() < WHOLE + 1  # one level of the rotation and one of the resize


def test_the_gpu_pipeline_can_be_described_without_a_gpu() -> None:
    """Has DALI check operators, devices and arguments, without building the pipeline."""
    made = view_pipeline(
        iter(()),
        ViewConfig(rotation_degrees=10),
        side=32,
        batch_size=8,
        threads=1,
        device_id=0,
        views=3,
        mean=np.zeros(3, np.float32),
        std=np.ones(3, np.float32),
    )
    assert made.device_id == 0


@pytest.mark.gpu
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "side"), [(32, 32), (32, 16)])
def test_the_whole_chain_agrees_on_the_gpu(
    photos: Callable[..., np.ndarray], size: int, side: int, interpolation: Interpolation
) -> None:
    images, view = photos(48, size), ViewConfig(rotation_degrees=15, interpolation=interpolation)
    difference = (render(images, view, side, "dali", "cuda") - render(images, view, side, "reference")).abs()
    assert difference.mean() < 0.5  # the CPU's 0.3, and room for another order of the sums
    assert difference.mean(dim=(1, 2, 3)).max() < 2


# the resident loader, whose resize rounds between its passes and leaves outside pixels out as torchvision's does


@pytest.mark.parametrize("name", COLORS)
def test_resident_views_follow_the_resize_exactly(photos: Callable[..., np.ndarray], name: str) -> None:
    images = photos(32, 32)
    ours, truth = (render(images, COLORS[name], 32, backend) for backend in ("resident", "reference"))
    assert (ours - truth).abs().max() < EXACT


@pytest.mark.parametrize("name", sorted(VIEWS))
@pytest.mark.parametrize(("size", "side"), [(32, 32), (28, 16), (64, 64)])
def test_every_named_view_is_the_same_from_every_loader(
    photos: Callable[..., np.ndarray], size: int, side: int, name: str
) -> None:
    images, view = photos(32, size), replace(VIEWS[name], rotation_degrees=10 if name == "quick" else 0)
    truth = render(images, view, side, "reference")
    # The greatest mean, and share of more than 3 levels. DALI: edges, and no rounding between.
    bounds: dict[LoaderName, tuple[float, float]] = {"resident": (0.1, 0.002), "dali": (0.3, 0.02)}
    for backend, (mean, share) in bounds.items():
        difference = (render(images, view, side, backend) - truth).abs()
        assert difference.mean() < mean, backend
        assert (difference > 3).float().mean() < share, backend  # 3 as above
        assert difference.mean(dim=(1, 2, 3)).max() < 2, backend


@pytest.mark.gpu
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "side"), [(32, 32), (32, 16), (64, 64)])
def test_the_resident_chain_agrees_on_the_gpu(
    photos: Callable[..., np.ndarray], size: int, side: int, interpolation: Interpolation
) -> None:
    images, view = photos(48, size), ViewConfig(rotation_degrees=15, interpolation=interpolation)
    difference = (render(images, view, side, "resident", "cuda") - render(images, view, side, "reference")).abs()
    assert difference.mean() < 0.1
    assert (difference > 3).float().mean() < 0.002
