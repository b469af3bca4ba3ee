"""convolution in Triton: one launch convolves and writes the moments of parts, a second one combines them per view.

An implicit product, [pixels of a view, 9 C] times [9 C, K]: 3 x 3, stride 1, padding 1, channels_last.

Letters: V views, R = N * H * W pixels per view (a channels_last image is H * W rows), C channels of x, K of y, P parts
per view.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnclglf_kernels._triton import launch
from mnclglf_kernels._triton.launch import Launch, Traffic, architecture, blocks, sum_dtype, total_bytes
from mnclglf_kernels._triton.tiles import ARCHITECTURES, Tile, Tuning, register, tile
from mnclglf_kernels.backend import INTERPRETED

# Rows are pixels, columns channels of y, depth channels of x. docs/lab/convolution.md has those that were compiled.
HALF = {arch: Tile(128, 64, 64, 4, 2) for arch in ARCHITECTURES}
FP32 = {arch: Tile(64, 64, 16, 4, 2) for arch in ARCHITECTURES}
register("convolution", half=(HALF, HALF, HALF), fp32=(FP32, FP32, FP32))
COLUMNS, LANES = 8, 512  # channels of a program of the second launch (32 bytes), and parts that it holds at a time


@triton.jit
def convolution_kernel(
    x,  # [V, R, C]: a channels_last image is H * W rows
    weight,  # [K, 3, 3, C]
    scale,  # None, or [V, C]: x * scale + shift and the ReLU come before the convolution
    shift,
    y,  # [V, R, K]
    moments,  # [V, P, 2, K]: mean and sum of squared deviations of a part, as in batch_norm
    R: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    SUM: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter cannot multiply bf16
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Computes OUTPUTS channels of a part of a view. Programs of the same part run side by side and share x in L2."""
    outputs, part, view = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.program_id(1), tl.program_id(2)
    pixels, inputs = part * PIXELS + tl.arange(0, PIXELS), tl.arange(0, INPUTS)
    inside = pixels < R
    row, column = pixels // W % H, pixels % W
    images = x + view.to(tl.int64) * (R * C) + pixels[:, None] * C + inputs[None, :]
    filters = weight + outputs[None, :] * (9 * C) + inputs[:, None]
    total = tl.zeros([PIXELS, OUTPUTS], SUM)
    # The taps are the inner loop: scale and shift stay in registers, and the nine reads of a pixel are near in time.
    for start in range(0, C, INPUTS):
        if scale is not None:
            slope = tl.load(scale + view * C + start + inputs)[None, :]
            offset = tl.load(shift + view * C + start + inputs)[None, :]
        for tap in range(9):
            down, right = tap // 3 - 1, tap % 3 - 1
            here = inside & (row + down >= 0) & (row + down < H) & (column + right >= 0) & (column + right < W)
            values = tl.load(images + ((down * W + right) * C + start), mask=here[:, None], other=0)
            if scale is not None:
                normal = tl.maximum(values.to(SUM) * slope + offset, 0, propagate_nan=tl.PropagateNan.ALL)  # pyright: ignore[reportPossiblyUnboundVariable]
                values = tl.where(here[:, None], normal, 0).to(values.dtype)  # padding comes after the batch norm
            taken = tl.load(filters + (tap * C + start))
            if WIDEN:
                values, taken = values.to(SUM), taken.to(SUM)
            total = tl.dot(values, taken, total, input_precision="ieee", out_dtype=SUM)
    place = y + view.to(tl.int64) * (R * K) + pixels[:, None] * K + outputs[None, :]
    tl.store(place, total, mask=inside[:, None])
    mean = tl.sum(total, 0) / tl.minimum(R - part * PIXELS, PIXELS)  # rows outside have sums of 0
    off = tl.where(inside[:, None], total - mean[None, :], 0)
    place = moments + (view.to(tl.int64) * P + part) * (2 * K) + outputs
    tl.store(place, mean)
    tl.store(place + K, tl.sum(off * off, 0))


@triton.jit
def convolution_combine_kernel(
    moments,  # [V, P, 2, K]
    mean,  # [V, K]
    var,  # [V, K]
    R: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    PIXELS: tl.constexpr,  # of a part
    SUM: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Combines the moments of a view's parts (Chan et al. 1979): lanes first, each its parts in order."""
    columns, view, lanes = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1), tl.arange(0, LANES)
    first = moments + view.to(tl.int64) * (P * 2 * K) + columns
    base = tl.load(first)  # a sum of differences from it rounds less than one of means
    off, squares = tl.zeros([LANES, COLUMNS], SUM), tl.zeros([LANES, COLUMNS], SUM)
    count = tl.zeros([LANES], SUM)  # pixels of a lane
    for start in range(0, P, LANES):
        parts = start + lanes
        here = (parts < P)[:, None]
        place = first[None, :] + parts[:, None] * (2 * K)
        pixels = tl.maximum(tl.minimum(R - parts * PIXELS, PIXELS), 0).to(SUM)
        share = pixels / tl.maximum(count + pixels, 1)
        delta = tl.where(here, tl.load(place, mask=here, other=0) - base[None, :] - off, 0)
        squares += tl.load(place + K, mask=here, other=0) + (count * share)[:, None] * delta * delta
        off += share[:, None] * delta
        count += pixels
    center = tl.sum(count[:, None] * off, 0) / R
    off -= center[None, :]
    tl.store(mean + view * K + columns, base + center)
    tl.store(var + view * K + columns, tl.sum(squares + count[:, None] * off * off, 0) / R)


def convolution_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    tensors = [a[name] for name in ("x", "weight", "scale", "shift", "y", "moments") if a[name] is not None]
    pixel = a["C"] * a["x"].itemsize
    taps = len(a["x"]) * (3 * a["H"] - 2) * (3 * a["W"] - 2)  # reads of pixels; those of the padding are masked
    issued = grid[0] * taps * pixel + a["P"] * grid[2] * total_bytes([a["weight"]])
    issued += total_bytes([a["y"], a["moments"]])
    issued += 0 if a["scale"] is None else grid[0] * a["P"] * total_bytes([a["scale"], a["shift"]])
    return Traffic(2 * 9 * a["y"].numel() * a["C"], total_bytes(tensors), issued)


def combine_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    moved = total_bytes([a["moments"], a["mean"], a["var"]])
    return Traffic(0, moved, moved + total_bytes([a["mean"]]))  # the first part's means are read twice


def empty_results(x: Tensor, outputs: int, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Makes y, mean and variance of a convolution that keeps the images' size."""
    n, _, h, w = x.shape
    y = x.new_empty((n, h, w, outputs)).permute(0, 3, 1, 2)
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, var = (x.new_empty((views, outputs), dtype=dtype) for _ in range(2))
    return y, mean, var


def convolution_tile(x: Tensor, arch: int) -> Tile:
    return tile("convolution", x.dtype, x.shape[1], arch)


def convolution_launches(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    t: Tile,
) -> list[Launch]:
    """The launches from x to y, mean and variance; x, weight and y are channels_last, C and K multiples of 16."""
    (n, c, h, w), (views, k) = x.shape, mean.shape
    columns, depth = gcd(t.columns, k), gcd(t.depth, c)
    rows = n // views * h * w
    parts = blocks(rows, t.rows)
    moments = mean.new_empty((views, parts, 2, k))
    shared: dict[str, Any] = dict(R=rows, K=k, P=parts, SUM=sum_dtype(x), PIXELS=t.rows)
    convolve = dict(x=x, weight=weight, scale=scale, shift=shift, y=y, moments=moments, **shared)
    convolve |= dict(H=h, W=w, C=c, WIDEN=INTERPRETED and x.dtype == torch.bfloat16, OUTPUTS=columns, INPUTS=depth)
    lanes = min(LANES, triton.next_power_of_2(parts))
    combine = dict(moments=moments, mean=mean, var=var, LANES=lanes, COLUMNS=COLUMNS, **shared)
    grid = k // columns, parts, views
    return [
        Launch(convolution_kernel, convolution_traffic, grid, convolve, warps=t.warps, stages=t.stages),
        Launch(convolution_combine_kernel, combine_traffic, (k // COLUMNS, views), combine, warps=8),
    ]


def launches(
    x: Tensor, weight: Tensor, *, views: int, scale: Tensor | None, shift: Tensor | None, arch: int, **_: Any
) -> list[Launch]:
    """The launches of one call."""
    results = empty_results(x, len(weight), views)
    return convolution_launches(x, weight, scale, shift, *results, convolution_tile(x, arch))


def tunings(
    x: Tensor, weight: Tensor, *, views: int, scale: Tensor | None, shift: Tensor | None, **_: Any
) -> Iterator[Tuning]:
    """The launches of a call, whose tile can be measured."""
    results = empty_results(x, len(weight), views)
    made = list(results)
    yield Tuning("convolution", lambda t: convolution_launches(x, weight, scale, shift, *results, t), made, x.shape[1])


@torch.library.custom_op("mnclglf::convolution", mutates_args=())
def convolution(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, views: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, and mean and biased variance of each view, [V, K]: 3 x 3, stride 1, padding 1."""
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    vectors = (None if t is None else t.contiguous() for t in (scale, shift))
    results = empty_results(x, len(weight), views)
    launch.run(convolution_launches(x, weight, *vectors, *results, convolution_tile(x, architecture(x))), x.device)
    return results


@convolution.register_fake
def _(x: Tensor, weight: Tensor, scale: Any, shift: Any, views: int) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(x, len(weight), views)
