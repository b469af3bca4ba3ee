"""Random numbers of an image's views, and the views without randomness for evaluation.

Every loader takes its numbers from `draw_parameters`. So a view depends only on the seed, the epoch, the image and the
number of the view: not on the loader, the batch, the number of threads or the step a run was resumed at.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mnclglf.config import ViewConfig, require
from mnclglf.data.images import Pixels
from mnclglf.data.philox import philox, uniform

CROP_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop, which then falls back to a central crop
# Blocks of four random words per view. A new augmentation takes its words from further blocks, so that those of the
# others do not change (tests/data/test_frozen_parameters.py).
_FIRST_BLOCKS = 8  # 2 * CROP_ATTEMPTS words for the crop's size, 12 for the rest
_FURTHER_BLOCKS = 1  # solarize uses the first word, the other three are free


@dataclass(frozen=True, kw_only=True)
class ViewParameters:
    """Parameters of N views, one array [N] per operation, in the order of the operations."""

    angle: NDArray[np.float32]
    """Rotation in degrees, counter-clockwise; 0 is off."""
    top: NDArray[np.int32]
    """First row of the crop in pixels."""
    left: NDArray[np.int32]
    """First column of the crop in pixels."""
    crop_height: NDArray[np.int32]
    """Rows of the crop in pixels."""
    crop_width: NDArray[np.int32]
    """Columns of the crop in pixels."""
    flip: NDArray[np.bool_]
    """True for a view that is mirrored left to right."""
    brightness: NDArray[np.float32]
    """Factor; 1 is off."""
    contrast: NDArray[np.float32]
    """Factor; 1 is off."""
    saturation: NDArray[np.float32]
    """Factor; 1 is off."""
    hue: NDArray[np.float32]
    """Shift in turns of the color wheel; 0 is off."""
    gray: NDArray[np.bool_]
    """True for a view without colors."""
    sigma: NDArray[np.float32]
    """Standard deviation of the blur in pixels; 0 is off."""
    solarize: NDArray[np.bool_]
    """True for a view whose pixels of at least half the largest level are inverted."""

    def __len__(self) -> int:
        return len(self.angle)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Returns the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def draw_parameters(
    seed: int,
    epoch: int,
    indices: ArrayLike,
    view: ArrayLike,
    config: ViewConfig,
    height: ArrayLike,
    width: ArrayLike,
) -> ViewParameters:
    """Draws the parameters of N views.

    Args:
        seed: the run's seed, below 2**64.
        epoch: passes over the data before this one.
        indices: rows [N] of the image set.
        view: number of the view of its image, one number or [N].
        config: distributions of the parameters.
        height: height of an image in pixels, one number or [N].
        width: width of an image in pixels, one number or [N].
    """
    rows, views = np.broadcast_arrays(np.asarray(indices, dtype=np.uint64), np.asarray(view, dtype=np.uint64))
    blocks = np.arange(_FIRST_BLOCKS + _FURTHER_BLOCKS, dtype=np.uint64)[:, None]
    words = uniform(philox((blocks, views, rows, epoch), seed))  # [4, blocks, N]; each is used once, below
    u = words[:, :_FIRST_BLOCKS].reshape(4 * _FIRST_BLOCKS, -1)
    further = words[:, _FIRST_BLOCKS:].swapaxes(0, 1).reshape(4 * _FURTHER_BLOCKS, -1)
    top, left, crop_height, crop_width = _draw_crop(u[:22], config, np.asarray(height), np.asarray(width))
    jitter = u[22] < config.jitter_probability

    def factor(row: NDArray[np.float64], strength: float) -> NDArray[np.float32]:
        return np.where(jitter, _between(row, 1 - strength, 1 + strength), 1.0).astype(np.float32)

    return ViewParameters(
        angle=_between(u[23], -config.rotation_degrees, config.rotation_degrees).astype(np.float32),
        top=top,
        left=left,
        crop_height=crop_height,
        crop_width=crop_width,
        flip=u[24] < config.flip_probability,
        brightness=factor(u[25], config.brightness),
        contrast=factor(u[26], config.contrast),
        saturation=factor(u[27], config.saturation),
        hue=np.where(jitter, _between(u[28], -config.hue, config.hue), 0.0).astype(np.float32),
        gray=u[29] < config.gray_probability,
        sigma=np.where(u[30] < config.blur_probability, _between(u[31], *config.blur_sigma), 0.0).astype(np.float32),
        solarize=further[0] < config.solarize_probability,
    )


def _between(u: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * u


def _draw_crop(
    u: NDArray[np.float64], config: ViewConfig, height: NDArray[np.int_], width: NDArray[np.int_]
) -> tuple[NDArray[np.int32], ...]:
    """Returns top, left, height and width of N crops from u [22, N], distributed as RandomResizedCrop.get_params."""
    area = height * width * _between(u[:CROP_ATTEMPTS], *config.crop_scale)
    ratio = np.exp(_between(u[CROP_ATTEMPTS : 2 * CROP_ATTEMPTS], *np.log(config.crop_ratio)))
    widths = np.rint(np.sqrt(area * ratio)).astype(np.int32)
    heights = np.rint(np.sqrt(area / ratio)).astype(np.int32)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.argmax(axis=0), np.arange(u.shape[1])
    found = fits.any(axis=0)
    central_height, central_width = _central_crop(config, height, width)
    crop_height = np.where(found, heights[first], central_height)
    crop_width = np.where(found, widths[first], central_width)
    top = np.where(found, np.floor(u[20] * (height - crop_height + 1)), (height - crop_height) // 2)
    left = np.where(found, np.floor(u[21] * (width - crop_width + 1)), (width - crop_width) // 2)
    return tuple(column.astype(np.int32) for column in (top, left, crop_height, crop_width))


def _central_crop(
    config: ViewConfig, height: NDArray[np.int_], width: NDArray[np.int_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns height and width of the crop used if no attempt fits: the whole image, cut to a ratio in range."""
    low, high = config.crop_ratio
    tall, wide = width / height < low, width / height > high
    crop_height = np.where(tall, np.maximum(1, np.rint(width / low)), height)
    return crop_height, np.where(wide, np.maximum(1, np.rint(height * high)), width)


def blur_window(config: ViewConfig, side: int) -> int:
    """Returns the width of the blur's window in pixels: the config's, or the odd number nearest side / 10 (>= 5).

    Raises:
        ValueError: half of the window is not less than the side, so that reflection would have to mirror twice.
    """
    window = config.blur_kernel or max(5, 2 * (side // 20) + 1)
    require(window // 2 < side, f"blur_kernel {window} is too wide for views of side {side}; lower it")
    return window


def whole_views(
    images: Pixels,
    side: int,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    dtype: torch.dtype,
) -> Tensor:
    """Returns the images at the size of a view, normalized, without randomness.

    Args:
        images: n images, each uint8 [H, W, 3] of any size, or one array [n, H, W, 3].
        side: side of the result in pixels. The shorter side of an image is resized to it (bicubic, antialiased), and
            the longer one is cropped at its center.
        mean: channel means [3] of the images scaled to [0, 1].
        std: channel deviations [3] of the images scaled to [0, 1].
        dtype: dtype of the result.

    Returns:
        Views [n, 3, side, side] in channels_last order, on the CPU.
    """
    if isinstance(images, np.ndarray):
        pixels = _fit(torch.tensor(images).permute(0, 3, 1, 2), side)
    else:
        pixels = torch.stack([_fit(torch.tensor(image).permute(2, 0, 1), side) for image in images])
    scaled = F.normalize(pixels.float() / 255, mean.tolist(), std.tolist())
    return scaled.to(dtype, memory_format=torch.channels_last)


def _fit(pixels: Tensor, side: int) -> Tensor:
    """Resizes and crops [..., H, W] to [..., side, side]."""
    shorter = min(pixels.shape[-2:])
    # Pixels far from the center do not reach the result. They are removed in pairs, so that the center stays.
    height, width = (side - max(0, (side - 3 * shorter) // 2 * 2) for side in pixels.shape[-2:])
    pixels = F.center_crop(pixels, [height, width])
    if shorter != side:
        size = [round(height * side / shorter), round(width * side / shorter)]
        pixels = F.resize(pixels, size, F.InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(pixels, [side, side])
