"""batch_norm in Triton: two launches forward, two backward.

Forward, the first launch reads x and writes the moments of parts of each view, the second combines them, reads x again
and writes the result: 3 passes over a tensor of x's size, 4 with a residual. Backward, the first launch reads x and the
upstream gradient and writes sums of parts, the second reads both again and writes the gradient of x: 5 passes. The
mask of the ReLU follows from x. With a residual it follows from the result, and the first launch writes the masked
gradient, which is the residual's and which the second one reads: 7 passes. Where the result has two uses, the launches
add their gradients as they read them: 7 passes, 8 with a residual, and none before that adds them.

With statistics over several ranks a small launch each way combines the parts of each view, a message takes the result
to all ranks, and the second launch combines what it brought.

Letters: V views, R = N * H * W rows per view (a channels_last image is H * W rows), C channels, P parts per view, W
ranks. Every sum has a fixed order: rows of a lane, lanes of a program, parts of a view, ranks, views.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnclglf_kernels._triton import launch
from mnclglf_kernels._triton.launch import Launch, Traffic, blocks, sum_dtype, total_bytes
from mnclglf_kernels.ops.batch_norm import running_factors
from mnclglf_kernels.ranks import gather, sum_over_ranks

TILE = 4096  # elements that a program holds at a time, at most
COLUMNS = 64  # channels of a tile, at most: 128 bytes of a 16-bit row
LANES = 1024  # rows of a tile, at most
PARTS = 16  # parts whose sums a program holds at a time
WARPS = 8


@triton.jit
def merged_moments(moments, view, columns, inside, R, C, ROWS, P: tl.constexpr, PARTS: tl.constexpr, SUM: tl.constexpr):
    """Returns mean and biased variance of one view from those of its parts, [columns] each (Chan et al. 1979)."""
    start = moments + view.to(tl.int64) * (P * 2 * C) + columns
    base = tl.load(start, mask=inside, other=0)  # a sum of differences from it rounds less than one of means
    first, mean = start[None, :], tl.zeros(columns.shape, SUM)
    for part in range(0, P, PARTS):
        parts = part + tl.arange(0, PARTS)
        here = (parts < P)[:, None] & inside[None, :]
        rows = tl.minimum(R - parts * ROWS, ROWS).to(SUM)[:, None]
        off = tl.where(here, tl.load(first + parts[:, None] * (2 * C), mask=here, other=0) - base[None, :], 0)
        mean += tl.sum(rows * off, 0)
    mean = base + mean / R
    squares = tl.zeros(columns.shape, SUM)
    for part in range(0, P, PARTS):
        parts = part + tl.arange(0, PARTS)
        here = (parts < P)[:, None] & inside[None, :]
        rows = tl.minimum(R - parts * ROWS, ROWS).to(SUM)[:, None]
        place = first + parts[:, None] * (2 * C)
        off = tl.where(here, tl.load(place, mask=here, other=0) - mean[None, :], 0)
        squares += tl.sum(tl.load(place + C, mask=here, other=0) + rows * off * off, 0)
    return mean, squares / R


@triton.jit
def merged_sums(sums, view, columns, inside, C, P: tl.constexpr, PARTS: tl.constexpr, SUM: tl.constexpr):
    """Returns the two sums of one view from those of its parts, [columns] each."""
    first = sums + view.to(tl.int64) * (P * 2 * C) + columns[None, :]
    plain, weighted = tl.zeros(columns.shape, SUM), tl.zeros(columns.shape, SUM)
    for part in range(0, P, PARTS):
        parts = part + tl.arange(0, PARTS)
        here = (parts < P)[:, None] & inside[None, :]
        place = first + parts[:, None] * (2 * C)
        plain += tl.sum(tl.load(place, mask=here, other=0), 0)
        weighted += tl.sum(tl.load(place + C, mask=here, other=0), 0)
    return plain, weighted


@triton.jit
def gathered_moments(gathered, view, columns, inside, C, V: tl.constexpr, RANKS: tl.constexpr, SUM: tl.constexpr):
    """Returns mean and biased variance of one view from those of all ranks, [columns] each (Chan et al. 1979)."""
    first = gathered + view * (2 * C) + columns
    base = tl.load(first, mask=inside, other=0)
    mean, variance = tl.zeros(columns.shape, SUM), tl.zeros(columns.shape, SUM)
    for rank in range(RANKS):
        mean += tl.load(first + rank * (V * 2 * C), mask=inside, other=0) - base
    mean = base + mean / RANKS
    for rank in range(RANKS):
        place = first + rank * (V * 2 * C)
        off = tl.load(place, mask=inside, other=0) - mean
        variance += tl.load(place + C, mask=inside, other=0) + off * off
    return mean, variance / RANKS


@triton.jit
def batch_norm_moments_kernel(
    x,
    moments,  # [V, P, 2, C]: mean and sum of squared deviations of a part
    R: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a part
    SUM: tl.constexpr,  # dtype of the sums
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Computes mean and sum of squared deviations of a part, by Welford's update per lane (Welford 1962)."""
    part, view = tl.program_id(0), tl.program_id(1)
    columns, lanes = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, LANES)
    inside = columns < C
    start = part * ROWS
    first = x + view.to(tl.int64) * (R * C) + columns[None, :]
    mean, squares = tl.zeros([LANES, COLUMNS], SUM), tl.zeros([LANES, COLUMNS], SUM)
    for row in range(0, ROWS, LANES):
        rows = start + row + lanes
        here = (rows < R)[:, None] & inside[None, :]
        value = tl.load(first + rows.to(tl.int64)[:, None] * C, mask=here, other=0).to(SUM)
        off = tl.where(here, value - mean, 0)
        mean += off / (row // LANES + 1)
        squares += off * (value - mean)
    count = tl.minimum(R - start, ROWS)
    counts = tl.maximum((count - lanes + LANES - 1) // LANES, 0).to(SUM)[:, None]  # rows of a lane
    base = tl.sum(tl.where((lanes == 0)[:, None], mean, 0), 0)  # the first lane's, as in merged_moments
    center = base + tl.sum(counts * (mean - base[None, :]), 0) / count
    off = mean - center[None, :]
    total = tl.sum(squares + counts * off * off, 0)
    place = moments + (view.to(tl.int64) * P + part) * (2 * C) + columns
    tl.store(place, center, mask=inside)
    tl.store(place + C, total, mask=inside)


@triton.jit
def batch_norm_merge_moments_kernel(
    moments,  # [V, P, 2, C], of parts
    own,  # [V, 2, C]: mean and biased variance of this rank's rows
    R: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    SUM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Combines the moments of the parts of a view."""
    view, columns = tl.program_id(1), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < C
    center, variance = merged_moments(moments, view, columns, inside, R, C, ROWS, P, PARTS, SUM)
    place = own + view * (2 * C) + columns
    tl.store(place, center, mask=inside)
    tl.store(place + C, variance, mask=inside)


@triton.jit
def batch_norm_apply_kernel(
    x,
    moments,  # [V, P, 2, C] of parts, or of several ranks what their merge_moments kernels wrote, [W, V, 2, C]
    weight,
    bias,
    residual,
    running_mean,
    running_var,
    y,
    mean,  # [V, C]
    deviation,  # [V, C]: 1 / sqrt(variance + eps)
    V: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    FACTORS: tl.constexpr,  # eps, then the V + 1 factors of the running statistics
    RELU: tl.constexpr,
    SUM: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Normalizes a part of a view. The first part's program keeps mean and deviation, and updates the running ones."""
    part, view = tl.program_id(0), tl.program_id(1)
    columns, lanes = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, LANES)
    inside = columns < C
    if RANKS == 1:
        center, variance = merged_moments(moments, view, columns, inside, R, C, ROWS, P, PARTS, SUM)
    else:
        center, variance = gathered_moments(moments, view, columns, inside, C, V, RANKS, SUM)
    inverse = 1 / tl.sqrt(variance + FACTORS[0])
    if part == 0:
        tl.store(mean + view * C + columns, center, mask=inside)
        tl.store(deviation + view * C + columns, inverse, mask=inside)
    if running_mean is not None:
        owns_running = (part == 0) & (view == 0)
        if owns_running:
            new_mean = FACTORS[1] * tl.load(running_mean + columns, mask=inside).to(SUM)
            new_var = FACTORS[1] * tl.load(running_var + columns, mask=inside).to(SUM)
            for v in tl.static_range(V):
                if RANKS == 1:
                    other_mean, other_var = merged_moments(
                        moments, view + v, columns, inside, R, C, ROWS, P, PARTS, SUM
                    )
                else:
                    other_mean, other_var = gathered_moments(moments, view + v, columns, inside, C, V, RANKS, SUM)
                new_mean += FACTORS[2 + v] * other_mean
                new_var += FACTORS[2 + v] * (other_var * (R * RANKS) / (R * RANKS - 1))
            tl.store(running_mean + columns, new_mean, mask=inside)
            tl.store(running_var + columns, new_var, mask=inside)
    scale = inverse * tl.load(weight + columns, mask=inside).to(SUM)
    shift = tl.load(bias + columns, mask=inside).to(SUM)
    first = view.to(tl.int64) * (R * C) + columns[None, :]
    for row in range(0, ROWS, LANES):
        rows = part * ROWS + row + lanes
        here = (rows < R)[:, None] & inside[None, :]
        place = first + rows.to(tl.int64)[:, None] * C
        value = tl.load(x + place, mask=here).to(SUM)
        result = (value - center[None, :]) * scale[None, :] + shift[None, :]
        if residual is not None:
            result += tl.load(residual + place, mask=here).to(SUM)
        if RELU:
            result = tl.where(result <= 0, 0, result)  # NaN stays NaN
        tl.store(y + place, result, mask=here)


@triton.jit
def batch_norm_sums_kernel(
    upstream,
    other,  # None, or the gradient of the result's second use
    x,
    y,  # None: the mask follows from x
    mean,
    deviation,
    weight,
    bias,
    masked,  # None, or where the masked gradient goes
    sums,  # [V, P, 2, C]: sums of the gradient, and of the gradient times the deviation from the mean
    R: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    RELU: tl.constexpr,
    SUM: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums the masked gradient of a part, plain and times x less its mean."""
    part, view = tl.program_id(0), tl.program_id(1)
    columns, lanes = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, LANES)
    inside = columns < C
    center = tl.load(mean + view * C + columns, mask=inside).to(SUM)
    if RELU and y is None:
        scale = tl.load(deviation + view * C + columns, mask=inside) * tl.load(weight + columns, mask=inside).to(SUM)
        shift = tl.load(bias + columns, mask=inside).to(SUM)
    first = view.to(tl.int64) * (R * C) + columns[None, :]
    plain, weighted = tl.zeros([LANES, COLUMNS], SUM), tl.zeros([LANES, COLUMNS], SUM)
    for row in range(0, ROWS, LANES):
        rows = part * ROWS + row + lanes
        here = (rows < R)[:, None] & inside[None, :]
        place = first + rows.to(tl.int64)[:, None] * C
        off = tl.load(x + place, mask=here, other=0).to(SUM) - center[None, :]
        gradient = tl.load(upstream + place, mask=here, other=0).to(SUM)
        if other is not None:
            gradient += tl.load(other + place, mask=here, other=0).to(SUM)
        if RELU:
            if y is None:
                gradient = tl.where(off * scale[None, :] + shift[None, :] <= 0, 0, gradient)  # pyright: ignore[reportPossiblyUnboundVariable]
            else:
                gradient = tl.where(tl.load(y + place, mask=here, other=0).to(SUM) <= 0, 0, gradient)
        if masked is not None:
            tl.store(masked + place, gradient, mask=here)
        plain += gradient
        weighted += gradient * off
    place = sums + (view.to(tl.int64) * P + part) * (2 * C) + columns
    tl.store(place, tl.sum(plain, 0), mask=inside)
    tl.store(place + C, tl.sum(weighted, 0), mask=inside)


@triton.jit
def batch_norm_merge_sums_kernel(
    sums,  # [V, P, 2, C], of parts
    deviation,
    own,  # [V, 2, C]: sums of the gradient, and of the gradient times the normalized x, of this rank's rows
    weight_gradient,
    bias_gradient,
    V: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    SUM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Combines the sums of the parts of each view, and makes this rank's gradients of weight and bias."""
    view, columns = tl.program_id(1), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)  # the first view
    inside = columns < C
    of_weight, of_bias = tl.zeros([COLUMNS], SUM), tl.zeros([COLUMNS], SUM)
    for v in tl.static_range(V):
        plain, weighted = merged_sums(sums, view + v, columns, inside, C, P, PARTS, SUM)
        weighted *= tl.load(deviation + v * C + columns, mask=inside)
        tl.store(own + v * (2 * C) + columns, plain, mask=inside)
        tl.store(own + v * (2 * C) + C + columns, weighted, mask=inside)
        of_weight += weighted
        of_bias += plain
    tl.store(weight_gradient + columns, of_weight, mask=inside)
    tl.store(bias_gradient + columns, of_bias, mask=inside)


@triton.jit
def batch_norm_gradient_kernel(
    upstream,  # masked already, unless MASK
    other,  # None, or the gradient of the result's second use, where `upstream` does not hold their sum
    x,
    mean,
    deviation,
    weight,
    bias,
    sums,  # [V, P, 2, C] of parts, or the sum over ranks of what their merge_sums kernels wrote, [V, 2, C]
    gradient,  # of x
    weight_gradient,  # None for several ranks, as merge_sums has made it
    bias_gradient,
    V: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    MASK: tl.constexpr,  # true: the mask follows from x
    SUM: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Makes the gradient of x of a part; the first part's program of the first view those of weight and bias too."""
    part, view = tl.program_id(0), tl.program_id(1)
    columns, lanes = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, LANES)
    inside = columns < C
    if RANKS == 1:
        owns_vectors = (part == 0) & (view == 0)
        if owns_vectors:
            of_weight, of_bias = tl.zeros([COLUMNS], SUM), tl.zeros([COLUMNS], SUM)
            for v in tl.static_range(V):
                plain, weighted = merged_sums(sums, view + v, columns, inside, C, P, PARTS, SUM)
                of_weight += weighted * tl.load(deviation + v * C + columns, mask=inside)
                of_bias += plain
            tl.store(weight_gradient + columns, of_weight, mask=inside)
            tl.store(bias_gradient + columns, of_bias, mask=inside)
    plain, weighted = merged_sums(sums, view, columns, inside, C, P, PARTS, SUM)
    center = tl.load(mean + view * C + columns, mask=inside).to(SUM)
    inverse = tl.load(deviation + view * C + columns, mask=inside).to(SUM)
    scale = inverse * tl.load(weight + columns, mask=inside).to(SUM)
    if RANKS == 1:
        average, slope = plain / R, inverse * inverse * weighted / R
    else:
        average, slope = plain / (R * RANKS), inverse * weighted / (R * RANKS)
    if MASK:
        shift = tl.load(bias + columns, mask=inside).to(SUM)
    first = view.to(tl.int64) * (R * C) + columns[None, :]
    for row in range(0, ROWS, LANES):
        rows = part * ROWS + row + lanes
        here = (rows < R)[:, None] & inside[None, :]
        place = first + rows.to(tl.int64)[:, None] * C
        off = tl.load(x + place, mask=here, other=0).to(SUM) - center[None, :]
        value = tl.load(upstream + place, mask=here, other=0).to(SUM)
        if other is not None:
            value += tl.load(other + place, mask=here, other=0).to(SUM)
        if MASK:
            value = tl.where(off * scale[None, :] + shift[None, :] <= 0, 0, value)  # pyright: ignore[reportPossiblyUnboundVariable]
        value = scale[None, :] * (value - average[None, :] - slope[None, :] * off)
        tl.store(gradient + place, value, mask=here)


def shape_of(x: Tensor, views: int) -> dict[str, Any]:
    """Returns the constants that all four kernels share.

    A program of the second launch reads the sums of all parts of its view. With P = sqrt(R / 16) these are an eighth
    of the elements that it reads of x, and the paper's sizes give 200 to 400 programs.
    """
    channels = x.shape[1]
    rows = x.numel() // (views * channels)
    columns = min(COLUMNS, triton.next_power_of_2(channels))
    lanes = min(TILE // columns, LANES, triton.next_power_of_2(rows))
    part = lanes * blocks(blocks(rows, max(1, isqrt(rows // 16))), lanes)
    return dict(R=rows, C=channels, P=blocks(rows, part), ROWS=part, SUM=sum_dtype(x), LANES=lanes, COLUMNS=columns)


def grid_of(views: int, shape: dict[str, Any]) -> tuple[int, int, int]:
    return shape["P"], views, blocks(shape["C"], shape["COLUMNS"])


def moments_launches(x: Tensor, mean: Tensor, ranks: int) -> tuple[list[Launch], Tensor]:
    """The launches from x to moments, and these: of each view's parts, or for several ranks of its rows."""
    views = len(mean)
    shape = shape_of(x, views)
    grid, moments = grid_of(views, shape), empty_sums(mean, shape)
    first = Launch(batch_norm_moments_kernel, moments_traffic, grid, dict(x=x, moments=moments, **shape), warps=WARPS)
    if ranks == 1:
        return [first], moments
    own, constants = empty_message(mean), {name: shape[name] for name in ("R", "C", "P", "ROWS", "SUM", "COLUMNS")}
    merge = dict(moments=moments, own=own, PARTS=PARTS, **constants)
    return [first, Launch(batch_norm_merge_moments_kernel, merge_moments_traffic, (1, *grid[1:]), merge)], own


def apply_launch(
    x: Tensor,
    moments: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    factors: Sequence[float],
    eps: float,
    relu: bool,
    ranks: int,
    y: Tensor,
    mean: Tensor,
    deviation: Tensor,
) -> Launch:
    """The launch from x and moments to y, mean and deviation; x, residual and y are channels_last or rows, all alike.

    For several ranks `moments` are theirs, [W, V, 2, C].
    """
    views = len(mean)
    shape = shape_of(x, views)
    arguments = dict(
        x=x,
        moments=moments,
        weight=weight,
        bias=bias,
        residual=residual,
        running_mean=running_mean,
        running_var=running_var,
        y=y,
        mean=mean,
        deviation=deviation,
        V=views,
        FACTORS=(eps, *factors),
        RELU=relu,
        PARTS=PARTS,
        RANKS=ranks,
        **shape,
    )
    return Launch(batch_norm_apply_kernel, apply_traffic, grid_of(views, shape), arguments, warps=WARPS)


def sums_launches(
    upstream: Tensor,
    other: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    deviation: Tensor,
    relu: bool,
    ranks: int,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    masked: Tensor | None,
) -> tuple[list[Launch], Tensor]:
    """The launches from the upstream gradients to `masked`, the residual's, and to sums, and these.

    The sums are of each view's parts, or for several ranks of its rows; then those of weight and bias are made too.
    """
    views = len(mean)
    shape = shape_of(x, views)
    grid, sums = grid_of(views, shape), empty_sums(mean, shape)
    statistics = dict(x=x, mean=mean, deviation=deviation, weight=weight, bias=bias, sums=sums, **shape)
    arguments = dict(upstream=upstream, other=other, y=y, masked=masked, RELU=relu, **statistics)
    first = Launch(batch_norm_sums_kernel, sums_traffic, grid, arguments, warps=WARPS)
    if ranks == 1:
        return [first], sums
    own, constants = empty_message(mean), {name: shape[name] for name in ("C", "P", "SUM", "COLUMNS")}
    gradients = dict(weight_gradient=weight_gradient, bias_gradient=bias_gradient)
    merge = dict(sums=sums, deviation=deviation, own=own, V=views, PARTS=PARTS, **gradients, **constants)
    return [first, Launch(batch_norm_merge_sums_kernel, merge_sums_traffic, (1, 1, grid[2]), merge)], own


def gradient_launch(
    upstream: Tensor,
    other: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    deviation: Tensor,
    sums: Tensor,
    relu: bool,
    ranks: int,
    gradient: Tensor,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    masked: Tensor | None,
) -> Launch:
    """The launch from the upstream gradients and sums to the gradients of x, weight and bias.

    For several ranks `sums` are over all of them, [V, 2, C], and the gradients of weight and bias are there already.
    """
    views, alone = len(mean), ranks == 1
    shape = shape_of(x, views)
    arguments = dict(
        upstream=upstream if masked is None else masked,
        other=other if masked is None else None,
        x=x,
        mean=mean,
        deviation=deviation,
        weight=weight,
        bias=bias,
        sums=sums,
        gradient=gradient,
        weight_gradient=weight_gradient if alone else None,
        bias_gradient=bias_gradient if alone else None,
        V=views,
        MASK=relu and masked is None,
        PARTS=PARTS,
        RANKS=ranks,
        **(shape if alone else shape | dict(P=1)),
    )
    return Launch(batch_norm_gradient_kernel, gradient_traffic, grid_of(views, shape), arguments, warps=WARPS)


def moments_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    moved = total_bytes([a["x"], a["moments"]])
    return Traffic(0, moved, moved)


def merge_moments_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    moments, own = total_bytes([a["moments"]]), total_bytes([a["own"]])
    again = moments // 2 + own // 2  # means are read twice, those of the first parts thrice
    return Traffic(0, moments + own, moments + own + again)


def merge_sums_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    names = ("sums", "deviation", "own", "weight_gradient", "bias_gradient")
    moved = total_bytes([a[name] for name in names])
    return Traffic(0, moved, moved)


def apply_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    updates = a["running_mean"] is not None
    running = 2 * total_bytes([a["running_mean"], a["running_var"]]) if updates else 0
    dense = total_bytes([x for x in (a["x"], a["residual"], a["y"]) if x is not None])
    kept, vectors = total_bytes([a["mean"], a["deviation"]]), total_bytes([a["weight"], a["bias"]])
    moments = total_bytes([a["moments"]])
    again = 3 * moments // 2 + total_bytes([a["mean"]])  # means are read twice, those of the first parts thrice
    issued = again * (a["P"] + updates) + vectors * a["P"] * a["V"]
    return Traffic(0, dense + kept + running + moments + vectors, dense + kept + running + issued)


def sums_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    tensors = (a[name] for name in ("upstream", "other", "x", "y", "masked", "sums"))
    dense = total_bytes([x for x in tensors if x is not None])
    mean, masks = total_bytes([a["mean"]]), a["RELU"] and a["y"] is None
    vectors = total_bytes([a["weight"], a["bias"]]) if masks else 0
    deviation = total_bytes([a["deviation"]]) if masks else 0
    issued = (mean + deviation) * a["P"] + vectors * a["P"] * len(a["mean"])
    return Traffic(0, dense + mean + deviation + vectors, dense + issued)


def gradient_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    tensors = (a[name] for name in ("upstream", "other", "x", "gradient", "weight_gradient", "bias_gradient"))
    dense = total_bytes([x for x in tensors if x is not None])
    sums, mean, deviation = (total_bytes([a[name]]) for name in ("sums", "mean", "deviation"))
    vectors = total_bytes([a["weight"], a["bias"]] if a["MASK"] else [a["weight"]])
    issued = (sums + mean + deviation) * grid[0] + vectors * grid[0] * a["V"]
    issued += sums + deviation if a["RANKS"] == 1 else 0
    return Traffic(0, dense + sums + mean + deviation + vectors, dense + issued)


def dense(x: Tensor) -> Tensor:
    """Returns x as rows of C adjacent channels: images in channels_last, which is no copy if they are so already."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def empty_dense(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def empty_statistics(x: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Makes mean and deviation, [V, C] each, in the dtype of the sums."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, deviation = (x.new_empty((views, x.shape[1]), dtype=dtype) for _ in range(2))
    return mean, deviation


def empty_sums(mean: Tensor, shape: dict[str, Any]) -> Tensor:
    views, channels = mean.shape
    return mean.new_empty((views, shape["P"], 2, channels))


def empty_message(mean: Tensor) -> Tensor:
    views, channels = mean.shape
    return mean.new_empty((views, 2, channels))


def empty_gradients(
    x: Tensor, weight: Tensor, bias: Tensor, keeps: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    gradients = empty_dense(x), torch.empty_like(weight), torch.empty_like(bias)
    return (*gradients, empty_dense(x) if keeps else None)


def launches(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    views: int = 1,
    residual: Tensor | None = None,
    relu: bool = False,
    fork: bool = False,
    ranks: int = 1,
    arch: int = 86,
) -> list[Launch]:
    """The launches of one call and of its backward pass, without the messages between several ranks."""
    y, statistics = empty_dense(x), empty_statistics(x, views)
    operands = weight, bias, running_mean, running_var, residual
    first, moments = moments_launches(x, statistics[0], ranks)
    moments = moments if ranks == 1 else moments.new_empty((ranks, *moments.shape))
    how = running_factors(0.1, views), 1e-5, relu, ranks
    kept = y if relu and residual is not None else None
    keeps = residual is not None and (relu or fork)
    gradient, *vectors, masked = empty_gradients(x, weight, bias, keeps)
    upstreams, saved = (empty_dense(x), empty_dense(x) if fork else None), (weight, bias, *statistics)
    second, sums = sums_launches(*upstreams, x, kept, *saved, relu, ranks, *vectors, masked)
    return [
        *first,
        apply_launch(x, moments, *operands, *how, y, *statistics),
        *second,
        gradient_launch(*upstreams, x, *saved, sums, relu, ranks, gradient, *vectors, masked),
    ]


@torch.library.custom_op("mnclglf::batch_norm", mutates_args=("running_mean", "running_var"))
def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    factors: Sequence[float],
    eps: float,
    relu: bool,
    ranks: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the result, and mean and deviation of each view, [V, C]."""
    x, y, statistics = dense(x), empty_dense(x), empty_statistics(x, len(factors) - 1)
    other = None if residual is None else dense(residual)
    weight, bias = weight.contiguous(), bias.contiguous()
    operands = weight, bias, running_mean, running_var, other
    first, moments = moments_launches(x, statistics[0], ranks)
    if ranks > 1:
        launch.run(first, x.device)
        first, moments = [], gather(moments)
    last = apply_launch(x, moments, *operands, factors, eps, relu, ranks, y, *statistics)
    launch.run([*first, last], x.device)
    return y, *statistics


@torch.library.custom_op("mnclglf::batch_norm_backward", mutates_args=())
def batch_norm_backward(
    upstream: Tensor,
    other: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    deviation: Tensor,
    relu: bool,
    keeps: bool,
    ranks: int = 1,
) -> list[Tensor]:
    """Returns the gradients of x, weight and bias; with `keeps` the sum of the upstream ones, masked, too."""
    x, weight, bias = dense(x), weight.contiguous(), bias.contiguous()
    upstreams = dense(upstream), None if other is None else dense(other)
    gradient, *vectors, masked = empty_gradients(x, weight, bias, keeps)
    saved = weight, bias, mean, deviation
    first, sums = sums_launches(*upstreams, x, y, *saved, relu, ranks, *vectors, masked)
    if ranks > 1:
        launch.run(first, x.device)
        first, sums = [], sum_over_ranks(sums)
    last = gradient_launch(*upstreams, x, *saved, sums, relu, ranks, gradient, *vectors, masked)
    launch.run([*first, last], x.device)
    return [x for x in (gradient, *vectors, masked) if x is not None]


@batch_norm.register_fake
def _(x: Tensor, w: Any, b: Any, mean: Any, var: Any, residual: Any, factors: Sequence[float], *_: Any) -> Any:
    return empty_dense(x), *empty_statistics(x, len(factors) - 1)


@batch_norm_backward.register_fake
def _(
    upstream: Any,
    other: Any,
    x: Tensor,
    y: Any,
    weight: Tensor,
    bias: Tensor,
    mean: Any,
    deviation: Any,
    relu: bool,
    keeps: bool,
    ranks: int = 1,
) -> list[Tensor]:
    return [gradient for gradient in empty_gradients(x, weight, bias, keeps) if gradient is not None]


class _BatchNorm(torch.autograd.Function):
    """The autograd formula. torch.library takes none for an operator that writes into an argument."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, Tensor]:
        x, weight, bias, _, _, residual, _, _, ctx.relu, ctx.ranks = operands
        y, mean, deviation = batch_norm(*operands)
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x, y if ctx.relu and ctx.has_residual else None, weight, bias, mean, deviation)
        ctx.set_materialize_grads(False)  # zeros for a use that has no gradient would be one more pass
        return y, y.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        given = [gradient for gradient in upstream if gradient is not None]
        if not given:
            return (None,) * 10
        first, *others = given
        keeps = ctx.has_residual and (ctx.relu or bool(others))
        saved = ctx.saved_tensors
        of_x, of_weight, of_bias, *masked = batch_norm_backward(
            first, *(others or [None]), *saved, ctx.relu, keeps, ctx.ranks
        )
        of_residual = (masked[0] if masked else first) if ctx.has_residual else None
        return of_x, of_weight, of_bias, None, None, of_residual, None, None, None, None


@torch.compiler.allow_in_graph  # Dynamo's own tracing of an autograd.Function refuses to write into an argument
def differentiable_batch_norm(*operands: Any) -> tuple[Tensor, Tensor]:
    """Returns the result of `batch_norm` twice; differentiable with respect to x, weight, bias and residual."""
    return cast(tuple[Tensor, Tensor], _BatchNorm.apply(*operands))
