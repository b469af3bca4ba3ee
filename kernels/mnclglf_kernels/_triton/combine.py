"""combine in Triton: every feature is read once, and every average is written once.

N images, F feature width, S = C(4, k) subsets.
"""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnclglf_kernels._triton import launch
from mnclglf_kernels._triton.launch import Launch, Traffic, blocks, sum_dtype, total_bytes

PATCHES = 4
BLOCK = 1024  # elements per program: 8 per thread, one 128-bit access for 16-bit elements


@triton.jit
def combine_kernel(
    features,
    combined,
    N: tl.constexpr,
    F: tl.constexpr,
    ROW_STRIDE: tl.constexpr,  # strides of the input: features, or with BACKWARD the gradient of combined
    COLUMN_STRIDE: tl.constexpr,
    SUBSETS: tl.constexpr,  # S tuples of K patch numbers
    K: tl.constexpr,
    BACKWARD: tl.constexpr,
    SUM: tl.constexpr,  # dtype of the sums
    BLOCK: tl.constexpr,
):
    """Averages the features of each subset. With BACKWARD it makes the gradient of features from that of combined."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < N * F
    read = index // F * ROW_STRIDE + index % F * COLUMN_STRIDE
    # A program holds the same BLOCK elements of all four patches, so each is loaded once for all subsets. Sums follow
    # the fixed order of SUBSETS, in SUM, and are divided by K once.
    if BACKWARD:
        gradients = ()
        for s in tl.static_range(len(SUBSETS)):
            gradients += (tl.load(combined + s * N * ROW_STRIDE + read, mask=inside).to(SUM),)
        for patch in tl.static_range(4):
            total = tl.zeros([BLOCK], SUM)
            for s in tl.static_range(len(SUBSETS)):
                for member in tl.static_range(K):
                    if SUBSETS[s][member] == patch:
                        total += gradients[s]
            tl.store(features + patch * N * F + index, total / K, mask=inside)
    else:
        patches = ()
        for patch in tl.static_range(4):
            patches += (tl.load(features + patch * N * ROW_STRIDE + read, mask=inside).to(SUM),)
        for s in tl.static_range(len(SUBSETS)):
            total = patches[SUBSETS[s][0]]
            for member in tl.static_range(1, K):
                total += patches[SUBSETS[s][member]]
            tl.store(combined + s * N * F + index, total / K, mask=inside)


def combine_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    moved = total_bytes([a["features"], a["combined"]])
    return Traffic(0, moved, moved)


def combine_launches(features: Tensor, combined: Tensor, k: int, *, backward: bool) -> list[Launch]:
    """The launch from [4N, F] features to [S * N, F] averages, or back. Its output is dense."""
    read = combined if backward else features
    count, width = features.shape[0] // PATCHES, features.shape[1]
    arguments = dict(
        features=features,
        combined=combined,
        N=count,
        F=width,
        ROW_STRIDE=read.stride(0),
        COLUMN_STRIDE=read.stride(1),
        SUBSETS=tuple(combinations(range(PATCHES), k)),
        K=k,
        BACKWARD=backward,
        SUM=sum_dtype(features),
        BLOCK=BLOCK,
    )
    return [Launch(combine_kernel, combine_traffic, (blocks(count * width, BLOCK),), arguments)]


def launches(features: Tensor, k: int, *, arch: int) -> list[Launch]:
    """The launches of one call and of its backward pass."""
    combined = empty_combined(features, k)
    return [x for backward in (False, True) for x in combine_launches(features, combined, k, backward=backward)]


def empty_combined(features: Tensor, k: int) -> Tensor:
    return features.new_empty((comb(PATCHES, k) * (features.shape[0] // PATCHES), features.shape[1]))


def empty_features(combined: Tensor, k: int) -> Tensor:
    return combined.new_empty((PATCHES * (combined.shape[0] // comb(PATCHES, k)), combined.shape[1]))


@torch.library.custom_op("mnclglf::combine", mutates_args=())
def combine(features: Tensor, k: int) -> Tensor:
    """Averages [4N, F] features into [S * N, F]."""
    combined = empty_combined(features, k)
    launch.run(combine_launches(features, combined, k, backward=False), features.device)
    return combined


@torch.library.custom_op("mnclglf::combine_backward", mutates_args=())
def combine_backward(gradient: Tensor, k: int) -> Tensor:
    """Returns the [4N, F] gradient of the features from the [S * N, F] one of the averages."""
    features = empty_features(gradient, k)
    launch.run(combine_launches(features, gradient, k, backward=True), gradient.device)
    return features


combine.register_fake(empty_combined)
combine_backward.register_fake(empty_features)


def _setup(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.k = inputs[1]


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return combine_backward(gradient, ctx.k), None


combine.register_autograd(_gradient, setup_context=_setup)
