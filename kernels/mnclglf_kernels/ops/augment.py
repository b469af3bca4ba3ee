"""augment: random views of stored images, from stored bytes to the network's input in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mnclglf_kernels.backend import Backend, resolve

PARAMETERS: dict[str, float] = {
    "angle": 0,  # rotation in degrees, counter-clockwise
    "top": 0,  # first row of the crop, in pixels
    "left": 0,  # first column of the crop
    "crop_height": 1,
    "crop_width": 1,
    "flip": 0,  # 1 to exchange left and right
    "brightness": 1,  # factors of the jitter
    "contrast": 1,
    "saturation": 1,
    "hue": 0,  # shift in turns of the color wheel
    "gray": 0,  # 1 for a gray view
    "sigma": 0,  # standard deviation of the blur, in pixels
    "solarize": 0,  # 1 to invert levels of 127.5 and above
}
"""Columns of the parameters in order, each with the value that changes nothing."""
LARGEST_SIDE = 64  # largest side of images and views: one program of the kernel holds a whole image

_LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
_WHITE = 255.0
# Unit: levels. It is 0.5 for pixels in [0, 1], as in BYOL. At 127.5 inverted and kept levels meet, so rounding is not
# amplified.
_SOLARIZE_THRESHOLD = 127.5
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ViewFormat(NamedTuple):
    """Settings that all views of a run share."""

    side: int
    """Side of a view in pixels."""
    cubic: bool = True
    """Resampling of the crop: Keys' cubic with a = -1/2 if true, else bilinear. Both are antialiased."""
    blur_window: int = 5
    """Taps of the blur, odd; 1 if no view is blurred."""
    rotates: bool = False
    """True to rotate views; otherwise the angles are ignored."""


def view_parameters(height: int, width: int, **changes: float) -> Tensor:
    """Returns the [1, 13] parameters of a view of the whole image, with `changes` by column."""
    values = PARAMETERS | {"crop_height": height, "crop_width": width} | changes
    return torch.tensor([list(values.values())], dtype=torch.float32)


def augment(
    images: Tensor,
    rows: Tensor,
    parameters: Tensor,
    mean: Tensor,
    std: Tensor,
    view_format: ViewFormat,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Returns views of images, ready for the network.

    The order is rotation, crop and resize, jitter, gray, flip, blur, solarize, normalization. Each operation matches
    torchvision's on bytes (transforms.v2.functional). Rotation and both passes of the resize end in whole levels. From
    there on pixels are real numbers, clamped after each change of color.

    Args:
        images: [M, 3, H, W] uint8.
        rows: [N] int64, the numbers of the images to make views of, below M.
        parameters: [V * N, 13], with the columns PARAMETERS, view-major: row v * N + n is view v of image rows[n]. The
            crop must lie within the image. fp32, or in the PyTorch form fp64, in which it then computes.
        mean: [3], mean of the images scaled to [0, 1], in the dtype of the parameters.
        std: [3], their standard deviation.
        view_format: settings that all views share.
        dtype: dtype of the result.
        out: where the result is written, of its shape and dtype, channels_last; None for a new tensor.
        backend: see `resolve`. The Triton form takes sides of at most 64.

    Returns:
        [V * N, 3, side, side], channels_last.

    Raises:
        ValueError: a shape or a setting does not fit.
        TypeError: a dtype does not fit.
    """
    _check(images, rows, parameters, mean, std, view_format, dtype)
    shape = (len(parameters), 3, view_format.side, view_format.side)
    if out is not None and (
        out.shape != shape or out.dtype != dtype or not out.is_contiguous(memory_format=torch.channels_last)
    ):
        raise ValueError(
            f"out is {out.dtype} of shape {tuple(out.shape)}; it must be {dtype} of {shape}, channels_last"
        )
    resolved = resolve(backend, images, rows, parameters, mean, std)
    largest = max(*images.shape[2:], view_format.side)
    if resolved == "triton" and backend == "triton":
        if largest > LARGEST_SIDE:
            raise ValueError(f"a side is {largest}; backend 'triton' augments up to {LARGEST_SIDE}, use 'torch'")
        if parameters.dtype == torch.float64:
            raise TypeError("backend 'triton' augments in fp32; give fp32 parameters, or use 'torch'")
    if resolved == "triton" and largest <= LARGEST_SIDE and parameters.dtype == torch.float32 and len(parameters):
        views = out
        if views is None:
            views = torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
        torch.ops.mnclglf.augment(images, rows, parameters, mean, std, views, *view_format[1:])
        return views
    device = "cpu" if images.is_meta else images.device.type  # there is no autocast for meta
    with torch.autocast(device, enabled=False):  # bf16 products would round the pixels
        views = _augment(images, rows, parameters, mean, std, view_format, dtype)
    return views if out is None else out.copy_(views)


def _check(
    images: Tensor,
    rows: Tensor,
    parameters: Tensor,
    mean: Tensor,
    std: Tensor,
    view_format: ViewFormat,
    dtype: torch.dtype,
) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images have shape {tuple(images.shape)}; augment needs [M, 3, H, W]")
    if images.dtype != torch.uint8 or rows.dtype != torch.int64:
        raise TypeError(f"images are {images.dtype} and rows {rows.dtype}; augment needs uint8 and int64")
    count = len(parameters)
    if rows.dim() != 1 or parameters.shape != (count, len(PARAMETERS)) or count % max(len(rows), 1):
        raise ValueError(
            f"rows have shape {tuple(rows.shape)} and parameters {tuple(parameters.shape)}; augment needs [N] and "
            f"[V * N, {len(PARAMETERS)}]"
        )
    if count and not len(rows):
        raise ValueError(f"there are {count} rows of parameters and no image to make views of")
    if parameters.dtype not in (torch.float32, torch.float64) or not parameters.dtype == mean.dtype == std.dtype:
        raise TypeError(
            f"parameters, mean and std are {parameters.dtype}, {mean.dtype} and {std.dtype}; they must all be fp32"
        )
    if mean.shape != (3,) or std.shape != (3,):
        raise ValueError(f"mean and std have shapes {tuple(mean.shape)} and {tuple(std.shape)}; augment needs [3]")
    window = view_format.blur_window
    if window < 1 or window % 2 == 0 or window // 2 >= view_format.side:
        raise ValueError(f"blur_window {window} must be odd and its half less than the side, {view_format.side}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype {dtype} is not floating point; take fp32, fp16 or bf16")


def _augment(
    images: Tensor,
    rows: Tensor,
    parameters: Tensor,
    mean: Tensor,
    std: Tensor,
    view_format: ViewFormat,
    dtype: torch.dtype,
) -> Tensor:
    """Makes all views at once. Resize and blur are products with [V * N, out, in] weight matrices."""
    p = dict(zip(PARAMETERS, parameters[:, :, None, None].unbind(1), strict=True))  # each [V * N, 1, 1]
    side, work = view_format.side, parameters.dtype
    pixels = images[rows].to(work).repeat(len(parameters) // max(len(rows), 1), 1, 1, 1)
    if view_format.rotates:
        pixels = _to_levels(_rotate(pixels, p["angle"]))
    across = _resize_weights(p["left"], p["crop_width"], pixels.shape[3], side, view_format.cubic)
    down = _resize_weights(p["top"], p["crop_height"], pixels.shape[2], side, view_format.cubic)
    pixels = _to_levels(pixels @ across.mT[:, None])  # across before down, as in torchvision
    pixels = _to_levels(down[:, None] @ pixels)
    colors = _change_colors(pixels.unbind(1), p)
    pixels = torch.where(p["flip"][:, None] > 0, torch.stack(colors, 1).flip(3), torch.stack(colors, 1))
    if view_format.blur_window > 1:
        blur = _blur_weights(p["sigma"], side, view_format.blur_window)[:, None]
        pixels = blur @ pixels @ blur.mT
    pixels = torch.where((p["solarize"][:, None] > 0) & (pixels >= _SOLARIZE_THRESHOLD), _WHITE - pixels, pixels)
    scale, shift = (x.view(3, 1, 1) for x in (1 / (_WHITE * std), mean / std))
    return (pixels * scale - shift).to(dtype, memory_format=torch.channels_last)


def _to_levels(pixels: Tensor) -> Tensor:
    """Rounds to whole levels from 0 to 255, halves up."""
    return (pixels + 0.5).floor().clamp(0, _WHITE)


def _rotate(pixels: Tensor, angle: Tensor) -> Tensor:
    """Rotates [n, 3, H, W] images about their center by [n, 1, 1] degrees: bilinear, black outside."""
    turn = angle.deg2rad().flatten()
    cosine, sine, zero = turn.cos(), turn.sin(), torch.zeros_like(turn)
    height, width = pixels.shape[2:]
    ratio = height / width  # coordinates run from -1 to 1 over either side
    affine = torch.stack([cosine, -sine * ratio, zero, sine / ratio, cosine, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _resize_weights(start: Tensor, length: Tensor, source: int, side: int, cubic: bool) -> Tensor:
    """Returns the [n, side, source] weights of an antialiased resize of [n, 1, 1] `length` pixels from `start` on."""
    places = torch.arange(source, dtype=start.dtype, device=start.device)
    out = torch.arange(side, dtype=start.dtype, device=start.device)[:, None]
    scale = length / side
    x = ((places - start + 0.5 - (out + 0.5) * scale) / scale.clamp(min=1)).abs()
    if cubic:
        far = torch.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0)
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, far)
    else:
        weights = (1 - x).clamp(min=0)
    weights = torch.where((places >= start) & (places < start + length), weights, 0)
    return weights / weights.sum(2, keepdim=True)


def _change_colors(colors: tuple[Tensor, ...], p: dict[str, Tensor]) -> list[Tensor]:
    """Applies brightness, contrast, saturation, hue and gray, in this order, to [n, S, S] colors in levels."""
    changed = [(x * p["brightness"]).clamp(max=_WHITE) for x in colors]
    middle = _luma(changed).mean((1, 2), keepdim=True)
    changed = [torch.lerp(middle, x, p["contrast"]).clamp(0, _WHITE) for x in changed]
    luma = _luma(changed)
    changed = [torch.lerp(luma, x, p["saturation"]).clamp(0, _WHITE) for x in changed]
    changed = _shift_hue(changed, p["hue"])
    luma = _luma(changed)
    return [torch.where(p["gray"] > 0, luma, x) for x in changed]


def _luma(colors: list[Tensor]) -> Tensor:
    red, green, blue = colors
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _shift_hue(colors: list[Tensor], turns: Tensor) -> list[Tensor]:
    """Adds turns to the hue in HSV.

    Let m be the least of r, g, b and C the difference between the greatest and m. With q = 1 + (g + b - r - m) / C, the
    hue in sixths of a turn is q if g >= b, else 6 - q. At hue h, red is m + C clamp(|h - 3| - 1), green is
    m + C clamp(2 - |h - 2|), blue is m + C clamp(2 - |h - 4|).
    """
    red, green, blue = colors
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue) - least
    sixths = 1 + (green + blue - red - least) / chroma.clamp(min=1e-6)
    hue = torch.where(green >= blue, sixths, 6 - sixths) + 6 * turns
    hue = hue - 6 * (hue / 6).floor()
    ramps = ((hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs())
    return [least + chroma * ramp.clamp(0, 1) for ramp in ramps]


def _blur_weights(sigma: Tensor, side: int, window: int) -> Tensor:
    """Returns the [n, side, side] weights of a Gaussian over `window` taps, mirrored about the edge pixels."""
    taps = torch.arange(window, device=sigma.device) - window // 2
    gauss = torch.where(sigma > 0, torch.exp(-0.5 * (taps / sigma) ** 2), (taps == 0).to(sigma.dtype))
    gauss = gauss / gauss.sum(2, keepdim=True)  # [n, 1, window]
    place = torch.arange(side, device=sigma.device)
    mirrored = (place[:, None] + taps).abs()
    mirrored = side - 1 - (side - 1 - mirrored).abs()
    hit = mirrored[..., None] == place  # [side, window, side]; F.one_hot would read the places on the host
    return torch.einsum("nt,otj->noj", gauss[:, 0], hit.to(gauss.dtype))
