"""Representations to classify: features of a frozen encoder, and raw pixels as a baseline."""

# n images, F feature width, C image channels

from __future__ import annotations

import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mnclglf.data.images import ImageArray, ImageSet
from mnclglf.data.views import whole_views
from mnclglf.training.ranks import ALONE, Ranks

CHUNK_IMAGES = 512  # images resized at once: 512 x 3 x 224 x 224 in fp32 are 300 MB


@contextmanager
def eval_mode(module: nn.Module) -> Generator[None, None, None]:
    """Context in evaluation mode; restores the mode of every submodule at the end, also after an exception."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Context of autocast to `dtype`; disabled for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def extract_features(
    encoder: nn.Module,
    images: ImageSet,
    *,
    side: int,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int = 512,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Returns features of the whole images, without augmentation.

    Ranks take the batches in turn, and rank 0 gets the features that one process has, to the bit.

    Args:
        encoder: network from [n, 3, side, side] to [n, F]; not changed, its batch-norm statistics included.
        images: the n images, in the order of the result.
        side: side of the encoder's input in pixels.
        mean: channel means [3] of the encoder's training.
        std: channel deviations [3] of the encoder's training.
        dtype: autocast dtype; float32 switches autocast off.
        device: device of the encoder.
        batch_size: images per forward; does not change the features.
        ranks: the processes that share the work, with the same encoder and images.

    Returns:
        Features, fp32 [n, F], on the CPU; on other ranks than 0 an empty tensor.

    Raises:
        ValueError: there are no images, or the encoder does not return one row per image.
    """
    _require_images(images)
    chunks: list[Tensor] = []
    with eval_mode(encoder), torch.inference_mode(), autocast(device, dtype):
        for batch in ranks.batches(0, len(images), batch_size):
            made = torch.empty(0)
            if batch:
                views = views_of(images, np.asarray(batch), side, mean, std, dtype).to(device)
                made = encoder(views).float().cpu()
                if made.ndim != 2 or len(made) != len(views):
                    raise ValueError(
                        f"the encoder made {tuple(made.shape)} of {len(views)} images; it must give [n, F] features"
                    )
            chunks += gathered(made, ranks)
    return torch.cat(chunks)  # outside inference mode, so that the result is a normal tensor


def gathered(rows: Tensor, ranks: Ranks) -> list[Tensor]:
    """Returns the rows fp32 [n, F] of all ranks, on the CPU, in the order of ranks; on other ranks than 0 nothing.

    Rank 0 has rows; others may have none, and n may differ.
    """
    if ranks.count == 1:
        return [rows]
    parts = ranks.exchange(rows.contiguous().numpy().tobytes())
    if not ranks.writes:
        return [torch.empty(0)]
    return [torch.from_numpy(np.frombuffer(part, np.float32).copy()).view(-1, rows.shape[1]) for part in parts]


def raw_pixels(images: ImageSet, *, side: int) -> Tensor:
    """Returns the images resized to side x side pixels, as rows: the baseline without learning.

    Returns:
        Pixels, fp32 [n, C * side * side] in [0, 1], channel by channel; C is 1 if all images are gray, else 3.

    Raises:
        ValueError: there are no images.
    """
    _require_images(images)
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    rows = torch.empty(len(images), 3, side * side)
    for start in range(0, len(images), CHUNK_IMAGES):
        some = np.arange(start, min(start + CHUNK_IMAGES, len(images)))
        rows[start : start + CHUNK_IMAGES] = views_of(images, some, side, zero, one, torch.float32).flatten(2)
    gray = torch.equal(rows[:, 0], rows[:, 1]) and torch.equal(rows[:, 0], rows[:, 2])
    return rows[:, 0].clone() if gray else rows.flatten(1)


def check_sets(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, classes: int
) -> None:
    """Raises ValueError unless the sets match in size and width, are finite, and have labels below `classes`."""
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if features.ndim != 2 or features.numel() == 0:
            raise ValueError(f"{name} features of shape {tuple(features.shape)} are empty or not [n, F]")
        if labels.shape != features.shape[:1]:
            raise ValueError(f"{tuple(labels.shape)} {name} labels do not fit {len(features)} rows of features")
        if not features.isfinite().all():
            raise ValueError(f"the {name} features hold NaN or infinity: the encoder that made them is broken")
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most >= classes:
            raise ValueError(f"{name} labels run from {least} to {most}, outside 0 to {classes - 1}")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"train features are {train_features.shape[1]} wide and test features {test_features.shape[1]}; take both "
            "from the same encoder at the same image side"
        )


def views_of(
    images: ImageSet,
    rows: NDArray[np.int64],
    side: int,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    dtype: torch.dtype,
) -> Tensor:
    """Returns whole_views of some images; files are decoded and resized one by one, which limits the memory."""
    if isinstance(images, ImageArray):
        return whole_views(images.read(rows), side, mean, std, dtype)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without the GIL
        views = threads.map(lambda row: whole_views([images.pixels(row)], side, mean, std, dtype), rows)
        return torch.cat(list(views)).contiguous(memory_format=torch.channels_last)


def _require_images(images: ImageSet) -> None:
    if len(images) == 0:
        raise ValueError(f"{images.name} {images.split} holds no images")
