"""divide: the 2 x 2 division of images into patches (Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from mnclglf_kernels.backend import Backend, resolve
from mnclglf_kernels.layout import memory_format

PATCHES = 4


def divide(images: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Cuts every image into its 2 x 2 patches (Algorithm 1, divide).

    Args:
        images: [N, C, H, W] with even H and W, any floating dtype; channels_last stays channels_last.
        backend: see `resolve`.

    Returns:
        [4N, C, H/2, W/2], patch-major: row p * N + n is patch p (row-major in the grid) of image n. Differentiable.

    Raises:
        ValueError: `images` does not have four dimensions, or a side is odd.
    """
    if images.dim() != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}; divide needs [N, C, H, W]")
    height, width = images.shape[2] // 2, images.shape[3] // 2
    for side in images.shape[2:]:
        if side % 2 or side == 0:
            raise ValueError(f"image side {side} is odd or zero; the 2 x 2 division needs an even side")
    if images.shape[0] and resolve(backend, images) == "triton":
        return torch.ops.mnclglf.divide(images)
    n, channels = images.shape[:2]
    if memory_format(images) == torch.channels_last:
        grid = images.permute(0, 2, 3, 1).reshape(n, 2, height, 2, width, channels).permute(1, 3, 0, 2, 4, 5)
        return grid.reshape(PATCHES * n, height, width, channels).permute(0, 3, 1, 2)
    grid = images.reshape(n, channels, 2, height, 2, width).permute(2, 4, 0, 1, 3, 5)
    return grid.reshape(PATCHES * n, channels, height, width)
