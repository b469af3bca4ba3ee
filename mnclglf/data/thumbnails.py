"""Small pictures of images, for the pages of a run."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from mnclglf.data.images import ImageArray, ImageSet, Pixels
from mnclglf.data.views import whole_views

LARGEST = 48  # pixels


def thumbnail_side(images: ImageSet) -> int:
    """Returns the side of a thumbnail in pixels: the images' own where that is small."""
    return min(max(images.images.shape[1:3]), LARGEST) if isinstance(images, ImageArray) else LARGEST


def thumbnails(images: ImageSet, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Returns thumbnails of the images at these rows, uint8 [n, t, t, 3]: the center square of an oblong one."""
    side = thumbnail_side(images)
    if isinstance(images, ImageArray):
        return _small(images.read(rows), side)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without the GIL; one large image at a time
        return np.concatenate([*threads.map(lambda row: _small([images.pixels(row)], side), rows)])


def _small(pixels: Pixels, side: int) -> NDArray[np.uint8]:
    views = whole_views(pixels, side, np.zeros(3, np.float32), np.ones(3, np.float32), torch.float32)
    return (views * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
