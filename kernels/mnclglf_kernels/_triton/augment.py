"""augment in Triton: one program per view, from stored bytes to finished pixels, with no intermediate in memory.

Resize and blur are products with weight matrices that each program computes, because Triton threads cannot fetch
pixels from each other. The color planes of a view are stacked, [4 * rows, columns]; the fourth plane is zeros, because
sides must be powers of two. Stacked, each warp owns some rows of a product. As three products of [S, S] all warps got
the same rows and, at 64 x 64, kept a kilobyte per thread in local memory.

A pass weighs the last dimension; then rows and columns are exchanged. Products take fp16 numbers and sum in fp32. A
whole level from 0 to 255 is exact in one fp16 number; every other number is the sum of two.

N images, H and W their sides, S side of a view; HP, WP and SP the same, padded to a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnclglf_kernels._triton import launch
from mnclglf_kernels._triton.launch import Launch, Traffic, total_bytes
from mnclglf_kernels.ops.augment import ViewFormat

WHITE = tl.constexpr(255.0)
SOLARIZE_THRESHOLD = tl.constexpr(127.5)  # unit: levels
DEGREE = tl.constexpr(0.017453292519943295)  # one degree in radians
RED = tl.constexpr(0.2989)
GREEN = tl.constexpr(0.587)
BLUE = tl.constexpr(0.114)


@triton.jit
def augment_kernel(
    images,
    rows,
    parameters,
    mean,
    std,
    views,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,  # columns of the parameters
    H: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    IMAGE_STRIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    CUBIC: tl.constexpr,
    WINDOW: tl.constexpr,  # taps of the blur, 1 for none
    ROTATES: tl.constexpr,
    HP: tl.constexpr,
    WP: tl.constexpr,
    SP: tl.constexpr,
):
    view = tl.program_id(0).to(tl.int64)
    image = images + tl.load(rows + view % N) * IMAGE_STRIDE
    given = parameters + view * COLUMNS
    angle, top, left = tl.load(given), tl.load(given + 1), tl.load(given + 2)
    height, width, flip = tl.load(given + 3), tl.load(given + 4), tl.load(given + 5)
    brightness, contrast, saturation = tl.load(given + 6), tl.load(given + 7), tl.load(given + 8)
    hue, gray, sigma = tl.load(given + 9), tl.load(given + 10), tl.load(given + 11)
    solarize = tl.load(given + 12)

    row = tl.arange(0, 4 * HP)[:, None]
    y, x = row % HP, tl.arange(0, WP)[None, :]
    planes = image + (row // HP).to(tl.int64) * CHANNEL_STRIDE
    there = row < 3 * HP
    if ROTATES:
        pixels = to_levels(rotated(planes, y, x, there, angle * DEGREE, H, W, ROW_STRIDE, COLUMN_STRIDE))
    else:
        pixels = load_pixels(planes, y, x, there, H, W, ROW_STRIDE, COLUMN_STRIDE)
    pixels = weigh_levels(pixels, resize_weights(left, width, S, SP, WP, CUBIC))
    pixels = weigh_levels(swapped(pixels, HP, SP), resize_weights(top, height, S, SP, HP, CUBIC))  # [4 * columns, rows]

    inside = (tl.arange(0, SP)[:, None] < S) & (tl.arange(0, SP)[None, :] < S)
    red, green, blue = unstacked(pixels, SP)
    red, green = tl.minimum(red * brightness, WHITE), tl.minimum(green * brightness, WHITE)
    blue = tl.minimum(blue * brightness, WHITE)
    middle = tl.sum(tl.where(inside, luma(red, green, blue), 0.0)) / (S * S)
    red, green, blue = blend(middle, red, contrast), blend(middle, green, contrast), blend(middle, blue, contrast)
    light = luma(red, green, blue)
    red, green, blue = blend(light, red, saturation), blend(light, green, saturation), blend(light, blue, saturation)
    red, green, blue = shift_hue(red, green, blue, hue)
    light = luma(red, green, blue)
    red, green, blue = tl.where(gray > 0, light, red), tl.where(gray > 0, light, green), tl.where(gray > 0, light, blue)
    pixels = stacked(red, green, blue, SP)

    if WINDOW > 1:
        if sigma > 0:
            weights = blur_weights(sigma, S, SP, WINDOW)
            pixels = weigh(swapped(weigh(pixels, weights), SP, SP), weights)
        else:
            pixels = swapped(pixels, SP, SP)
    else:
        pixels = swapped(pixels, SP, SP)
    row = tl.arange(0, 4 * SP)[:, None]
    channel, y, x = row // SP, row % SP, tl.arange(0, SP)[None, :]
    inside = (channel < 3) & (y < S) & (x < S)
    if solarize > 0:
        pixels = tl.where(pixels >= SOLARIZE_THRESHOLD, WHITE - pixels, pixels)
    middle = tl.where(channel == 0, tl.load(mean), tl.where(channel == 1, tl.load(mean + 1), tl.load(mean + 2)))
    deviation = tl.where(channel == 0, tl.load(std), tl.where(channel == 1, tl.load(std + 1), tl.load(std + 2)))
    pixels = pixels / (WHITE * deviation) - middle / deviation
    place = views + ((view * S + y) * S + tl.where(flip > 0, S - 1 - x, x)) * 3 + channel
    tl.store(place, pixels, mask=inside)


@triton.jit
def swapped(planes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Transposes each plane: [4 * ROWS, COLUMNS] to [4 * COLUMNS, ROWS]."""
    return tl.reshape(tl.permute(tl.reshape(planes, [4, ROWS, COLUMNS]), [0, 2, 1]), [4 * COLUMNS, ROWS])


@triton.jit
def unstacked(planes, SP: tl.constexpr):
    """Splits [4 * SP, SP] into red, green and blue, each [SP, SP]."""
    even, odd = tl.split(tl.permute(tl.reshape(planes, [2, 2, SP, SP]), [2, 3, 0, 1]))
    red, blue = tl.split(even)
    green, _ = tl.split(odd)
    return red, green, blue


@triton.jit
def stacked(red, green, blue, SP: tl.constexpr):
    """Stacks red, green and blue into [4 * SP, SP]: the inverse of unstacked."""
    planes = tl.join(tl.join(red, blue), tl.join(green, green))
    return tl.reshape(tl.permute(planes, [2, 3, 0, 1]), [4 * SP, SP])


@triton.jit
def halves(x):
    """Splits fp32 numbers into two fp16 numbers, whose sum has 22 bits."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def weigh_levels(levels, weights):
    """Returns weighted sums of whole levels over the last dimension, rounded to whole levels."""
    high, low = halves(weights)
    exact = levels.to(tl.float16)
    return to_levels(tl.dot(exact, high, tl.dot(exact, low)))


@triton.jit
def weigh(pixels, weights):
    """Returns weighted sums over the last dimension. Low times low is omitted: it is below fp32's rounding."""
    high, low = halves(weights)
    pixels_high, pixels_low = halves(pixels)
    return tl.dot(pixels_high, high, tl.dot(pixels_high, low, tl.dot(pixels_low, high)))


@triton.jit
def resize_weights(start, length, S: tl.constexpr, SP: tl.constexpr, SOURCES: tl.constexpr, CUBIC: tl.constexpr):
    """Returns the [SOURCES, SP] weights of an antialiased resize of `length` pixels from `start` on to S pixels."""
    source, out = tl.arange(0, SOURCES)[:, None], tl.arange(0, SP)[None, :]
    scale = length / S
    x = tl.abs((source - start + 0.5 - (out + 0.5) * scale) / tl.maximum(scale, 1.0))
    if CUBIC:
        far = tl.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0.0)
        weights = tl.where(x < 1, (1.5 * x - 2.5) * x * x + 1, far)
    else:
        weights = tl.maximum(1 - x, 0.0)
    weights = tl.where((source >= start) & (source < start + length), weights, 0.0)
    total = tl.sum(weights, 0)[None, :]
    return tl.where(out < S, weights / tl.where(out < S, total, 1.0), 0.0)


@triton.jit
def load_pixels(
    planes, y, x, there, H: tl.constexpr, W: tl.constexpr, ROW_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr
):
    """Loads bytes as fp32, with 0 outside the image."""
    inside = there & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    place = planes + y.to(tl.int64) * ROW_STRIDE + x.to(tl.int64) * COLUMN_STRIDE
    return tl.load(place, mask=inside, other=0).to(tl.float32)


@triton.jit
def rotated(
    planes,
    y,
    x,
    there,
    radians,
    H: tl.constexpr,
    W: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
):
    """Rotates the image about its center: bilinear, black outside."""
    sine, cosine = sine_and_cosine(radians)
    from_middle_y, from_middle_x = y + 0.5 - H / 2, x + 0.5 - W / 2
    source_y = sine * from_middle_x + cosine * from_middle_y + (H / 2 - 0.5)
    source_x = cosine * from_middle_x - sine * from_middle_y + (W / 2 - 0.5)
    first_y, first_x = tl.floor(source_y), tl.floor(source_x)
    down, right = source_y - first_y, source_x - first_x
    first_y, first_x = first_y.to(tl.int32), first_x.to(tl.int32)
    there &= (y < H) & (x < W)
    pixels = tl.zeros(source_y.shape, tl.float32)
    for below in tl.static_range(2):
        for beside in tl.static_range(2):
            share = (down if below else 1 - down) * (right if beside else 1 - right)
            tap = load_pixels(planes, first_y + below, first_x + beside, there, H, W, ROW_STRIDE, COLUMN_STRIDE)
            pixels += share * tap
    return pixels


@triton.jit
def sine_and_cosine(x):
    """Returns (sin x, cos x) for x from -pi to pi, with an error of at most 7e-7.

    tl.sin and tl.cos keep an array for large angles, which takes local memory. Here the series are evaluated at x / 4
    and the angle is doubled twice: sin 2x = 2 sin x cos x, cos 2x = 1 - 2 sin^2 x.
    """
    q = x / 4
    s = q * q
    sine = q * (1 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s / 362880))))
    cosine = 1 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320 - s / 3628800))))
    for _ in tl.static_range(2):
        sine, cosine = 2 * sine * cosine, 1 - 2 * sine * sine
    return sine, cosine


@triton.jit
def to_levels(pixels):
    """Rounds to whole levels from 0 to 255, halves up."""
    return tl.minimum(tl.maximum(tl.floor(pixels + 0.5), 0.0), WHITE)


@triton.jit
def luma(red, green, blue):
    return RED * red + GREEN * green + BLUE * blue


@triton.jit
def blend(other, pixels, factor):
    return tl.minimum(tl.maximum(other + factor * (pixels - other), 0.0), WHITE)


@triton.jit
def shift_hue(red, green, blue, turns):
    """Adds turns to the hue, by the formulas of mnclglf_kernels.ops.augment."""
    least = tl.minimum(tl.minimum(red, green), blue)
    chroma = tl.maximum(tl.maximum(red, green), blue) - least
    sixths = 1 + (green + blue - red - least) / tl.maximum(chroma, 1e-6)
    hue = tl.where(green >= blue, sixths, 6 - sixths) + 6 * turns
    hue -= 6 * tl.floor(hue / 6)
    red = least + chroma * ramp(tl.abs(hue - 3) - 1)
    green = least + chroma * ramp(2 - tl.abs(hue - 2))
    return red, green, least + chroma * ramp(2 - tl.abs(hue - 4))


@triton.jit
def ramp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def blur_weights(sigma, S: tl.constexpr, SP: tl.constexpr, WINDOW: tl.constexpr):
    """Returns the [SP, SP] weights of a Gaussian over WINDOW taps, mirrored about the edge pixels."""
    source, out = tl.arange(0, SP)[:, None], tl.arange(0, SP)[None, :]
    weights = tl.zeros([SP, SP], tl.float32)
    total = 0.0
    for tap in tl.static_range(WINDOW):
        away = (tap - WINDOW // 2) / sigma
        weight = tl.exp(-0.5 * away * away)
        mirrored = tl.abs(out + (tap - WINDOW // 2))
        mirrored = S - 1 - tl.abs(S - 1 - mirrored)
        weights += tl.where(mirrored == source, weight, 0.0)
        total += weight
    return tl.where((source < S) & (out < S), weights / total, 0.0)


def augment_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    """Returns the traffic: each view reads its whole image, and a rotation counts four reads per pixel, its maximum."""
    count, h, w, s = grid[0], a["HP"], a["WP"], a["SP"]
    image, written = 3 * a["H"] * a["W"], total_bytes([a["views"]])
    row = 8 + 4 * a["parameters"].shape[1] + 4 * 6  # image number, parameters of the view, mean and std
    resize = 2 * 4 * s * (h * w + h * s)
    blur = 3 * 4 * s * s * s * 2 if a["WINDOW"] > 1 else 0
    return Traffic(
        2 * count * (resize + blur),
        len(a["rows"]) * (image + 8) + total_bytes([a["parameters"], a["mean"], a["std"]]) + written,
        count * (image * (4 if a["ROTATES"] else 1) + row) + written,
    )


def augment_launches(
    images: Tensor,
    rows: Tensor,
    parameters: Tensor,
    mean: Tensor,
    std: Tensor,
    views: Tensor,
    *,
    cubic: bool,
    blur_window: int,
    rotates: bool,
) -> list[Launch]:
    """The launch that writes [V * N, 3, S, S] channels_last views of [M, 3, H, W] images of any strides."""
    (height, width), side = images.shape[2:], views.shape[2]
    image, channel, down, right = images.stride()
    # At least 16: the smallest side that tl.dot multiplies.
    padded = [max(16, triton.next_power_of_2(x)) for x in (height, width, side)]
    arguments = dict(
        images=images,
        rows=rows,
        parameters=parameters,
        mean=mean,
        std=std,
        views=views,
        N=len(rows),
        COLUMNS=parameters.shape[1],
        H=height,
        W=width,
        S=side,
        IMAGE_STRIDE=image,
        CHANNEL_STRIDE=channel,
        ROW_STRIDE=down,
        COLUMN_STRIDE=right,
        CUBIC=cubic,
        WINDOW=blur_window,
        ROTATES=rotates,
        **dict(zip(("HP", "WP", "SP"), padded, strict=True)),
    )
    # Compiled for sm_86: 111 registers per thread at 32 x 32 with 4 warps and 230 at 64 x 64 with 8, without spills.
    return [Launch(augment_kernel, augment_traffic, (len(parameters),), arguments, warps=8 if max(padded) > 32 else 4)]


def launches(
    images: Tensor,
    rows: Tensor,
    parameters: Tensor,
    mean: Tensor,
    std: Tensor,
    view_format: ViewFormat,
    *,
    dtype: torch.dtype,
    arch: int,
) -> list[Launch]:
    """The launch of one call."""
    views, (_, cubic, blur_window, rotates) = empty_views(parameters, view_format.side, dtype), view_format
    given = (images, rows, parameters, mean, std, views)
    return augment_launches(*given, cubic=cubic, blur_window=blur_window, rotates=rotates)


def empty_views(parameters: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    views = torch.empty(len(parameters), side, side, 3, dtype=dtype, device=parameters.device)
    return views.permute(0, 3, 1, 2)


@torch.library.custom_op("mnclglf::augment", mutates_args=("views",))
def augment(
    images: Tensor,
    rows: Tensor,
    parameters: Tensor,
    mean: Tensor,
    std: Tensor,
    views: Tensor,
    cubic: bool,
    blur_window: int,
    rotates: bool,
) -> None:
    """Writes views of [M, 3, H, W] bytes into [V * N, 3, S, S], channels_last."""
    given = [x.contiguous() for x in (rows, parameters, mean, std)]
    launched = augment_launches(images, *given, views, cubic=cubic, blur_window=blur_window, rotates=rotates)
    launch.run(launched, images.device)


@augment.register_fake
def _(*_: Any) -> None:
    return None
