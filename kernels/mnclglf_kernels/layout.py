"""Memory formats of images."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(images: Tensor) -> torch.memory_format:
    """Returns channels_last if [N, C, H, W] images are dense in it and not contiguous, else contiguous_format."""
    if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def empty_images(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Returns uninitialized images with the dtype, device and memory format of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like))
