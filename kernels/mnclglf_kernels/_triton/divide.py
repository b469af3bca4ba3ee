"""divide in Triton: every pixel is read once and written once.

N images, C channels, H and W sides.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnclglf_kernels._triton import launch
from mnclglf_kernels._triton.launch import Launch, Traffic, blocks
from mnclglf_kernels.layout import empty_images, memory_format

PATCHES = 4
BLOCK = 1024  # elements per program: 8 per thread, one 128-bit access for 16-bit elements


@triton.jit
def divide_kernel(
    images,
    patches,
    N: tl.constexpr,
    A: tl.constexpr,  # sizes of a patch, outermost dimension first
    B: tl.constexpr,
    L: tl.constexpr,
    IMAGE_STRIDE: tl.constexpr,  # strides of the same dimensions in the images
    A_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr,
    L_STRIDE: tl.constexpr,
    DOWN: tl.constexpr,  # offsets from a patch to the one below it, and to the one right of it
    RIGHT: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies images to dense patches. With BACKWARD it copies the gradients of patches to those of images.

    The map is one to one, so backward is the same kernel with load and store exchanged.
    """
    # int64: image number times image stride can pass 2^31.
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < 4 * N * A * B * L
    # Each one is computed from the index itself. From a remainder of a remainder Triton 3.8 does not see that elements
    # are adjacent, and loads them one by one: eight loads in place of one.
    row, a, b, column = index // (A * B * L), index // (B * L) % A, index // L % B, index % L
    patch, image = row // N, row % N
    place = image * IMAGE_STRIDE + a * A_STRIDE + b * B_STRIDE + column * L_STRIDE
    place += patch // 2 * DOWN + patch % 2 * RIGHT
    if BACKWARD:
        tl.store(images + place, tl.load(patches + index, mask=inside), mask=inside)
    else:
        tl.store(patches + index, tl.load(images + place, mask=inside), mask=inside)


def divide_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    moved = 2 * a["patches"].numel() * a["patches"].itemsize
    return Traffic(0, moved, moved)


def divide_launches(images: Tensor, patches: Tensor, *, backward: bool) -> list[Launch]:
    """The launch that copies [N, C, H, W] images of any strides to dense [4N, C, H/2, W/2] patches, or back."""
    count, (channels, height, width) = images.shape[0], patches.shape[1:]
    image, channel, down, right = images.stride()
    if patches.is_contiguous():
        dimensions = [(channels, channel), (height, down), (width, right)]
    elif right == channels * channel:  # adjacent pixels: columns and channels merge into one long run
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
    return [Launch(divide_kernel, divide_traffic, (blocks(patches.numel(), BLOCK),), arguments)]


def launches(images: Tensor, *, arch: int) -> list[Launch]:
    """The launches of one call and of its backward pass."""
    patches = empty_patches(images)
    return [x for backward in (False, True) for x in divide_launches(images, patches, backward=backward)]


def empty_patches(images: Tensor) -> Tensor:
    n, c, h, w = images.shape
    return empty_images((PATCHES * n, c, h // 2, w // 2), images)


def empty_divided(patches: Tensor) -> Tensor:
    n, c, h, w = patches.shape
    return empty_images((n // PATCHES, c, 2 * h, 2 * w), patches)


@torch.library.custom_op("mnclglf::divide", mutates_args=())
def divide(images: Tensor) -> Tensor:
    """Divides [N, C, H, W] images into [4N, C, H/2, W/2] patches."""
    patches = empty_patches(images)
    launch.run(divide_launches(images, patches, backward=False), images.device)
    return patches


@torch.library.custom_op("mnclglf::divide_backward", mutates_args=())
def divide_backward(gradient: Tensor) -> Tensor:
    """Returns the [N, C, H, W] gradient of the images from the dense [4N, C, H/2, W/2] one of the patches."""
    images = empty_divided(gradient)
    launch.run(divide_launches(images, gradient, backward=True), gradient.device)
    return images


divide.register_fake(empty_patches)
divide_backward.register_fake(empty_divided)


def _gradient(ctx: Any, gradient: Tensor) -> Tensor:
    return divide_backward(gradient.contiguous(memory_format=memory_format(gradient)))


divide.register_autograd(_gradient)
