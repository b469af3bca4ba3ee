"""augment against torchvision, one view and one operation after the other, and its two forms against each other."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mnclglf_kernels import augment
from mnclglf_kernels.ops.augment import PARAMETERS, ViewFormat

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
COLUMNS = len(PARAMETERS)
OFF = dict(flip=0, brightness=1, contrast=1, saturation=1, hue=0, gray=0, sigma=0, angle=0, solarize=0)
# Levels: fp32's rounding of numbers up to 255 through twenty operations, where no sum is rounded to a whole level.
EXACT = 0.01
# A resize ends in whole levels, and a sum within rounding of a half becomes another one. torchvision's weights have
# 16 bits, so that many sums of few pixels end as near as that.
WHOLE = 1.01


def smooth(count: int, height: int, width: int) -> Tensor:
    """Images with all levels, edges and gradients, uint8 [count, 3, height, width]."""
    waves = torch.rand(count, 3, 1, 1, 4) * 0.6 + 0.1
    y, x = torch.arange(height).view(1, 1, -1, 1), torch.arange(width).view(1, 1, 1, -1)
    values = (
        128 + 90 * torch.sin(waves[..., 0] * y + waves[..., 1] * x) + 60 * torch.cos(waves[..., 2] * x * waves[..., 3])
    )
    values[:, :, height // 2 :, : width // 3] = 255 - values[:, :, height // 2 :, : width // 3]
    return values.clamp(0, 255).round().to(torch.uint8)


def random_parameters(views: int, height: int, width: int, *, degrees: float = 0.0, **fixed: float) -> Tensor:
    """[views, COLUMNS]: crops of all sizes, jitter, gray, flip, blur and solarize, each of them off in some views."""
    u = dict(
        zip(PARAMETERS, torch.rand(12, views), strict=False)
    )  # of the first twelve; later columns draw behind them
    on = torch.rand(4, views) > 0.4
    size_y, size_x = (u["crop_height"] * height).ceil(), (u["crop_width"] * width).ceil()
    columns = dict(
        angle=(2 * u["angle"] - 1) * degrees,
        top=(u["top"] * (height - size_y + 1)).floor(),
        left=(u["left"] * (width - size_x + 1)).floor(),
        crop_height=size_y,
        crop_width=size_x,
        flip=(u["flip"] > 0.5).float(),
        **{name: torch.where(on[0], 0.6 + 0.8 * u[name], 1.0) for name in ("brightness", "contrast", "saturation")},
        hue=torch.where(on[1], u["hue"] - 0.5, 0.0),
        gray=(u["gray"] > 0.7).float(),
        sigma=torch.where(on[2], 0.1 + 1.9 * u["sigma"], 0.0),
        solarize=(torch.rand(views) > 0.7).float(),
    )
    columns = {name: torch.full((views,), float(value)) for name, value in PARAMETERS.items()} | columns
    columns |= {name: torch.full((views,), float(value)) for name, value in fixed.items()}
    return torch.stack([columns[name] for name in PARAMETERS], 1)


def whole_image(views: int, height: int, width: int, **fixed: float) -> Tensor:
    return random_parameters(
        views, height, width, **dict(OFF, top=0, left=0, crop_height=height, crop_width=width) | fixed
    )


def torchvision_view(image: Tensor, numbers: list[float], view_format: ViewFormat) -> Tensor:
    """[3, S, S] in levels, not normalised."""
    p = dict(zip(PARAMETERS, numbers, strict=True))
    mode = F.InterpolationMode.BICUBIC if view_format.cubic else F.InterpolationMode.BILINEAR
    pixels = F.rotate(image, p["angle"], F.InterpolationMode.BILINEAR) if view_format.rotates else image
    top, left, height, width = (int(p[name]) for name in ("top", "left", "crop_height", "crop_width"))
    pixels = F.resized_crop(pixels, top, left, height, width, [view_format.side] * 2, mode, antialias=True)
    pixels = F.to_dtype(pixels, torch.float32, scale=True)
    for name in ("brightness", "contrast", "saturation", "hue"):
        if p[name] != OFF[name]:
            pixels = getattr(F, f"adjust_{name}")(pixels, p[name])
    if p["gray"]:
        pixels = F.rgb_to_grayscale(pixels, num_output_channels=3)
    if p["flip"]:
        pixels = F.horizontal_flip(pixels)
    if p["sigma"]:
        pixels = F.gaussian_blur(pixels, [view_format.blur_window] * 2, [p["sigma"]] * 2)
    if p["solarize"]:
        pixels = F.solarize(pixels, 0.5)
    return pixels * 255


def torchvision_views(images: Tensor, rows: Tensor, parameters: Tensor, view_format: ViewFormat) -> Tensor:
    chosen = images[rows].repeat(len(parameters) // len(rows), 1, 1, 1).contiguous()
    return torch.stack(
        [
            torchvision_view(image, numbers, view_format)
            for image, numbers in zip(chosen, parameters.tolist(), strict=True)
        ]
    )


def in_levels(views: Tensor) -> Tensor:
    return (views.double() * STD.double().view(3, 1, 1) + MEAN.double().view(3, 1, 1)) * 255


def ours(images: Tensor, rows: Tensor, parameters: Tensor, view_format: ViewFormat, **how: Any) -> Tensor:
    return augment(images, rows, parameters, MEAN, STD, view_format, **how)


CHANGES = {
    "nothing": dict(),
    "flip": dict(flip=1),
    "brightness": dict(brightness=1.4),
    "darkness": dict(brightness=0.3),
    "contrast": dict(contrast=1.7),
    "less contrast": dict(contrast=0.2),
    "saturation": dict(saturation=2),
    "no saturation": dict(saturation=0),
    "hue": dict(hue=0.1),
    "hue the other way": dict(hue=-0.37),
    "half a turn of hue": dict(hue=0.5),
    "gray": dict(gray=1),
    "blur": dict(sigma=2),
    "little blur": dict(sigma=0.4),
    "solarize": dict(solarize=1),
    "blurred and solarized": dict(sigma=1.3, solarize=1),
    "all": dict(solarize=1, flip=1, brightness=1.3, contrast=0.7, saturation=1.5, hue=0.2, sigma=0.9),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("side", [16, 31])
def test_what_follows_the_resize_is_torchvision_s(name, side, backend):
    images, rows = smooth(4, side, side), torch.arange(4)
    parameters, view_format = whole_image(4, side, side, **CHANGES[name]), ViewFormat(side)
    views = in_levels(ours(images, rows, parameters, view_format, backend=backend))
    truth = torchvision_views(images, rows, parameters, view_format)
    assert (views - truth).abs().max() < EXACT
    assert name == "nothing" or (truth - images).abs().max() > 1  # or nothing was tested


def test_hue_of_pure_tied_and_gray_colors(backend):
    levels = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8)
    colors = torch.cartesian_prod(levels, levels, levels)  # 216
    image = colors.repeat(2, 1)[:256].t().reshape(1, 3, 16, 16)
    for hue in (-0.5, -0.21, 1 / 6, 0.3):
        parameters = whole_image(1, 16, 16, hue=hue)
        views = in_levels(ours(image, torch.tensor([0]), parameters, ViewFormat(16), backend=backend))
        assert (views - torchvision_views(image, torch.tensor([0]), parameters, ViewFormat(16))).abs().max() < EXACT


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "side"), [(32, 32, 32), (28, 28, 16), (13, 40, 24), (64, 64, 64), (8, 8, 33)]
)
def test_crops_are_torchvision_s_to_a_level(height, width, side, cubic, backend):
    images, rows, view_format = smooth(6, height, width), torch.arange(6), ViewFormat(side, cubic=cubic)
    parameters = random_parameters(12, height, width, **OFF)
    difference = in_levels(ours(images, rows, parameters, view_format, backend=backend)) - torchvision_views(
        images, rows, parameters, view_format
    )
    assert difference.abs().max() < 2 * WHOLE  # a level of the first pass can tip the second one
    assert (difference.abs() > WHOLE).double().mean() < 0.001
    assert (difference.abs() > EXACT).double().mean() < 0.03


@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 20)])
def test_rotation_is_torchvision_s_to_a_level(height, width, backend):
    images, rows, view_format = smooth(6, height, width), torch.arange(6), ViewFormat(32, cubic=False, rotates=True)
    parameters = whole_image(6, height, width)
    parameters[:, 0] = torch.tensor([-180.0, -88.0, -13.0, 0.0, 45.0, 171.0])
    difference = in_levels(ours(images, rows, parameters, view_format, backend=backend)) - torchvision_views(
        images, rows, parameters, view_format
    )
    assert difference.abs().max() < 2 * WHOLE
    assert (difference.abs() > EXACT).double().mean() < 0.01


@pytest.mark.parametrize(
    ("height", "side", "view_format"),
    [
        (32, 32, {}),
        (28, 16, dict(cubic=False, rotates=True)),
        (20, 36, dict(blur_window=7)),
        (16, 16, dict(blur_window=1)),
    ],
    ids=str,
)
def test_the_whole_chain_is_torchvision_s(height, side, view_format, backend):
    images, rows, view_format = smooth(8, height, height), torch.randperm(8)[:5], ViewFormat(side, **view_format)
    off = dict(sigma=0) if view_format.blur_window == 1 else {}
    parameters = random_parameters(15, height, height, degrees=30, **off)
    difference = in_levels(ours(images, rows, parameters, view_format, backend=backend)) - torchvision_views(
        images, rows, parameters, view_format
    )
    # A level of the resize grows by brightness, contrast and saturation, 1.4 each, and where two channels nearly tie
    # by hue; and the view's mean, which contrast needs, moves by its share of the levels.
    assert difference.abs().mean() < 0.05
    assert (difference.abs() > 3).double().mean() < 0.002
    assert (difference.abs() > 0.1).double().mean() < 0.05


@settings(max_examples=25)
@given(
    height=st.integers(1, 64),
    width=st.integers(1, 64),
    side=st.integers(4, 64),
    count=st.integers(1, 3),
    views=st.integers(1, 3),
    cubic=st.booleans(),
    rotates=st.booleans(),
    window=st.sampled_from([1, 3, 5, 7]),
)
def test_any_shape(height, width, side, count, views, cubic, rotates, window, backend):
    view_format = ViewFormat(side, cubic, window, rotates)
    images, rows = smooth(4, height, width), torch.arange(count)
    parameters = random_parameters(views * count, height, width, degrees=180)
    made = in_levels(ours(images, rows, parameters, view_format, backend=backend))
    doubles = (x.double() for x in (parameters, MEAN, STD))
    truth = in_levels(augment(images, rows, *doubles, view_format=view_format, dtype=torch.float64, backend="torch"))
    assert made.shape == (views * count, 3, side, side)
    # Sums that end at a half are frequent where sizes are small or whole multiples: two levels, then the jitter.
    assert (made - truth).abs().max() < 8
    assert (made - truth).abs().median() < 0.5
    assert (made - truth).abs().mean() < 0.75


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_what_a_network_eats(dtype, backend):
    images, rows, parameters = smooth(5, 20, 20), torch.tensor([4, 0, 0]), random_parameters(9, 20, 20)
    views = ours(images, rows, parameters, ViewFormat(18), dtype=dtype, backend=backend)
    exact = ours(images, rows, parameters, ViewFormat(18), backend=backend)
    assert views.dtype == dtype
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert not views.requires_grad
    torch.testing.assert_close(views.float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_views_are_those_of_their_rows(backend):
    """View-major: row v * N + n is view v of image rows[n], whatever else is in the batch."""
    images, rows, parameters = smooth(7, 16, 16), torch.tensor([6, 2]), random_parameters(6, 16, 16)
    views = ours(images, rows, parameters, ViewFormat(16), backend=backend)
    for v in range(3):
        for n in range(2):
            alone = ours(images, rows[n : n + 1], parameters[2 * v + n, None], ViewFormat(16), backend=backend)
            torch.testing.assert_close(views[2 * v + n], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, ::2, 1:],
        lambda x: x[1:].flip(0),
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
    ],
    ids=["channels_last", "sides", "every second", "flipped", "one image", "one channel"],
)
def test_images_of_any_strides(view, backend):
    images = view(smooth(4, 18, 18))
    rows, view_format = torch.arange(len(images)), ViewFormat(16)
    parameters = random_parameters(len(images), *images.shape[2:])
    dense = ours(images.contiguous(), rows, parameters, view_format, backend=backend)
    assert torch.equal(ours(images, rows, parameters, view_format, backend=backend), dense)


def test_strided_rows_parameters_and_statistics(backend):
    images, rows, parameters = smooth(4, 16, 16), torch.arange(4), random_parameters(8, 16, 16)
    expected = ours(images, rows, parameters, ViewFormat(16), backend=backend)
    spread = [x.repeat_interleave(2, 0)[::2] for x in (rows, MEAN, STD)]
    spread.insert(1, parameters.t().contiguous().t())
    made = augment(images, *spread, view_format=ViewFormat(16), backend=backend)
    assert torch.equal(made, expected)


def test_inputs_are_left_alone(backend):
    given = smooth(3, 16, 16), torch.arange(3), random_parameters(3, 16, 16), MEAN.clone(), STD.clone()
    before = [x.clone() for x in given]
    augment(*given, ViewFormat(16), backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_no_images(backend):
    given = smooth(3, 16, 16), torch.arange(0), torch.empty(0, COLUMNS), ViewFormat(16)
    views = ours(*given, dtype=torch.float16, backend=backend)
    assert views.shape == (0, 3, 16, 16)
    assert views.dtype == torch.float16


def test_one_pixel_images_and_extreme_statistics(backend):
    image = torch.tensor([7, 0, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    views = ours(image, torch.tensor([0]), whole_image(1, 1, 1), ViewFormat(16), backend=backend)
    expected = image.double().expand(1, 3, 16, 16)
    assert (in_levels(views) - expected).abs().max() < EXACT


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (dict(images=torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), ValueError, r"\(2, 1, 8, 8\)"),
        (dict(images=torch.zeros(2, 3, 8, 8)), TypeError, "float32"),
        (dict(images=torch.zeros(2, 3, 0, 8, dtype=torch.uint8)), ValueError, r"\(2, 3, 0, 8\)"),
        (dict(rows=torch.zeros(2, dtype=torch.int32)), TypeError, "int32"),
        (dict(rows=torch.zeros(3, dtype=torch.int64)), ValueError, rf"\(3,\).*\(4, {COLUMNS}\)"),
        (dict(rows=torch.zeros(0, dtype=torch.int64)), ValueError, "4 rows of parameters and no image"),
        (dict(parameters=torch.zeros(4, COLUMNS - 1)), ValueError, rf"\(4, {COLUMNS - 1}\)"),
        (dict(parameters=torch.zeros(4, COLUMNS).half()), TypeError, "float16"),
        (dict(mean=torch.zeros(3).double()), TypeError, "float64"),
        (dict(std=torch.zeros(1)), ValueError, r"\[3\]"),
        (dict(view_format=ViewFormat(8, blur_window=4)), ValueError, "blur_window 4"),
        (dict(view_format=ViewFormat(4, blur_window=9)), ValueError, "blur_window 9"),
        (dict(dtype=torch.int32), TypeError, "int32"),
    ],
)
def test_what_does_not_fit_is_named(change, error, named, backend):
    given = dict(
        images=torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        rows=torch.zeros(2, dtype=torch.int64),
        parameters=whole_image(4, 8, 8),
        mean=MEAN,
        std=STD,
        view_format=ViewFormat(8),
    )
    with pytest.raises(error, match=named):
        augment(**given | change, backend=backend)


def test_large_sides_are_pytorch_s_work():
    images, parameters = smooth(1, 65, 20), random_parameters(1, 65, 20)
    for view_format in (ViewFormat(16), ViewFormat(80)):
        views = ours(images, torch.tensor([0]), parameters, view_format, backend="torch")
        truth = torchvision_views(images, torch.tensor([0]), parameters, view_format)
        assert (in_levels(views) - truth).abs().mean() < 0.05
        with pytest.raises(ValueError, match=f"a side is {max(65, view_format.side)}.*up to 64"):
            ours(images, torch.tensor([0]), parameters, view_format, backend="triton")
    doubles = [x.double() for x in (parameters, MEAN, STD)]
    with pytest.raises(TypeError, match="fp32"):
        augment(images[:, :, :20], torch.tensor([0]), *doubles, view_format=ViewFormat(16), backend="triton")


def test_autocast_changes_nothing(backend):
    given = smooth(3, 16, 16), torch.arange(3), random_parameters(6, 16, 16)
    expected = ours(*given, ViewFormat(16), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(*given, ViewFormat(16), backend=backend), expected)
