"""divide and combine in Triton: every element is read once and written once.

N images, C channels, H and W sides, F feature width, S = C(4, k) subsets.
"""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnclglf_kernels._triton.launch import Launch, blocks, run, sum_dtype
from mnclglf_kernels.layout import empty_images, memory_format

PATCHES = 4
BLOCK = 1024  # elements a program: 8 a thread, one 128-bit access of 16-bit elements


@triton.jit
def divide_kernel(
    images,
    patches,
    N: tl.constexpr,
    A: tl.constexpr,  # sizes of a patch, outermost first
    B: tl.constexpr,
    L: tl.constexpr,
    IMAGE_STRIDE: tl.constexpr,  # the same dimensions in the images
    A_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr,
    L_STRIDE: tl.constexpr,
    DOWN: tl.constexpr,  # from a patch to the one below it, and to the one right of it
    RIGHT: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """patches = divide(images), or where BACKWARD images from patches, their gradients; patches are dense."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < 4 * N * A * B * L
    # Each from the index itself: from a remainder of a remainder Triton 3.8 sees no neighbors, and loads one by one.
    row, a, b, column = index // (A * B * L), index // (B * L) % A, index // L % B, index % L
    patch, image = row // N, row % N
    place = image * IMAGE_STRIDE + a * A_STRIDE + b * B_STRIDE + column * L_STRIDE
    place += patch // 2 * DOWN + patch % 2 * RIGHT
    if BACKWARD:
        tl.store(images + place, tl.load(patches + index, mask=inside), mask=inside)
    else:
        tl.store(patches + index, tl.load(images + place, mask=inside), mask=inside)


@triton.jit
def combine_kernel(
    features,
    combined,
    N: tl.constexpr,
    F: tl.constexpr,
    ROW_STRIDE: tl.constexpr,  # of what is read: features, or where BACKWARD the gradient of combined
    COLUMN_STRIDE: tl.constexpr,
    SUBSETS: tl.constexpr,  # S tuples of K patches
    K: tl.constexpr,
    BACKWARD: tl.constexpr,
    SUM: tl.constexpr,  # dtype of the sums
    BLOCK: tl.constexpr,
):
    """combined = combine(features, K), or where BACKWARD the gradient of features from that of combined."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < N * F
    read = index // F * ROW_STRIDE + index % F * COLUMN_STRIDE
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


def divide_launches(images: Tensor, patches: Tensor, *, backward: bool) -> list[Launch]:
    """The launch between [N, C, H, W] images of any strides and dense [4N, C, H/2, W/2] patches."""
    count, (channels, height, width) = images.shape[0], patches.shape[1:]
    image, channel, down, right = images.stride()
    if patches.is_contiguous():
        dimensions = [(channels, channel), (height, down), (width, right)]
    elif right == channels * channel:  # pixels follow each other: columns and channels are one dimension
        dimensions = [(1, 0), (height, down), (width * channels, channel)]
    else:
        dimensions = [(height, down), (width, right), (channels, channel)]
    (a, a_stride), (b, b_stride), (last, last_stride) = dimensions
    arguments = dict(
        images=images,
        patches=patches,
        N=count,
        A=a,
        B=b,
        L=last,
        IMAGE_STRIDE=image,
        A_STRIDE=a_stride,
        B_STRIDE=b_stride,
        L_STRIDE=last_stride,
        DOWN=height * down,
        RIGHT=width * right,
        BACKWARD=backward,
        BLOCK=BLOCK,
    )
    return [Launch(divide_kernel, (blocks(patches.numel(), BLOCK),), arguments)]


def combine_launches(features: Tensor, combined: Tensor, k: int, *, backward: bool) -> list[Launch]:
    """The launch between [4N, F] features and [S * N, F] combined; what is written is dense."""
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
    return [Launch(combine_kernel, (blocks(count * width, BLOCK),), arguments)]


def empty_patches(images: Tensor) -> Tensor:
    n, c, h, w = images.shape
    return empty_images((PATCHES * n, c, h // 2, w // 2), images)


def empty_divided(patches: Tensor) -> Tensor:
    n, c, h, w = patches.shape
    return empty_images((n // PATCHES, c, 2 * h, 2 * w), patches)


def empty_combined(features: Tensor, k: int) -> Tensor:
    return features.new_empty((comb(PATCHES, k) * (features.shape[0] // PATCHES), features.shape[1]))


def empty_features(combined: Tensor, k: int) -> Tensor:
    return combined.new_empty((PATCHES * (combined.shape[0] // comb(PATCHES, k)), combined.shape[1]))


@torch.library.custom_op("mnclglf::divide", mutates_args=())
def divide(images: Tensor) -> Tensor:
    """[N, C, H, W] to [4N, C, H/2, W/2]."""
    patches = empty_patches(images)
    run(divide_launches(images, patches, backward=False), images.device)
    return patches


@torch.library.custom_op("mnclglf::divide_backward", mutates_args=())
def divide_backward(gradient: Tensor) -> Tensor:
    """[4N, C, H/2, W/2], dense, to [N, C, H, W]."""
    images = empty_divided(gradient)
    run(divide_launches(images, gradient, backward=True), gradient.device)
    return images


@torch.library.custom_op("mnclglf::combine", mutates_args=())
def combine(features: Tensor, k: int) -> Tensor:
    """[4N, F] to [S * N, F]."""
    combined = empty_combined(features, k)
    run(combine_launches(features, combined, k, backward=False), features.device)
    return combined


@torch.library.custom_op("mnclglf::combine_backward", mutates_args=())
def combine_backward(gradient: Tensor, k: int) -> Tensor:
    """[S * N, F] to [4N, F]."""
    features = empty_features(gradient, k)
    run(combine_launches(features, gradient, k, backward=True), gradient.device)
    return features


divide.register_fake(empty_patches)
divide_backward.register_fake(empty_divided)
combine.register_fake(empty_combined)
combine_backward.register_fake(empty_features)


def _divide_gradient(ctx: Any, gradient: Tensor) -> Tensor:
    return divide_backward(gradient.contiguous(memory_format=memory_format(gradient)))


def _combine_setup(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.k = inputs[1]


def _combine_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return combine_backward(gradient, ctx.k), None


divide.register_autograd(_divide_gradient)
combine.register_autograd(_combine_gradient, setup_context=_combine_setup)
