"""An estimate of side, batch and time of a run on a card that need not be there. Nothing of it is measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mnclglf.config import DataConfig, RunConfig, Stem
from mnclglf.data.images import ImageArray, ImageSet, view_side
from mnclglf.training.memory import largest_batch
from mnclglf.training.progress import duration
from mnclglf.training.roofline import least_seconds, nominal_peaks
from mnclglf.training.start import with_classes

CARD_BYTES = int(23.5 * 2**30)  # what a card of 24 GB leaves to a process
CARDS = (86, 89)  # architectures of cards of 24 GB: RTX 3090 and RTX 4090
# Shares of the roofline that the eager step and the compiled step with CUDA graphs reached on an H200 at 32 x 32
# (docs/explain/performance.md).
REACHED = (0.31, 0.53)
LARGEST_SIDE, SMALLEST_SIDE, CIFAR_SIDE = 224, 32, 64
PAPER_BATCH = 256


def suggested(config: RunConfig, images: ImageSet) -> RunConfig:
    """Returns a run with the side and the batch to take for these images on a card of 24 GB, in bf16.

    The side is that of images of one size in memory; of others 224, or less where half of the images are smaller. The
    batch is the paper's, or less where that does not fit.
    """
    if isinstance(images, ImageArray):
        side = view_side(images, None)
    else:
        shorter = int(np.median(np.minimum(*images.sizes(np.arange(len(images))))))
        side = min(LARGEST_SIDE, max(SMALLEST_SIDE, shorter // 32 * 32))
    stem: Stem = "cifar" if side <= CIFAR_SIDE else "imagenet"
    config = replace(config, data=DataConfig(image_size=side), model=replace(config.model, stem=stem))
    fits = min(largest_batch(config, side, torch.bfloat16, CARD_BYTES), len(images))
    batch = PAPER_BATCH if fits >= PAPER_BATCH else fits // 8 * 8 if fits >= 16 else fits
    return replace(config, optim=replace(config.optim, batch_size=max(2, batch)))


def forecast(config: RunConfig, images: ImageSet) -> list[str]:
    """Returns lines with side, batch and time of an epoch of a run on these images on a card of 24 GB.

    Args:
        config: a run on these images; its side and batch are chosen.
        images: what to train on.
    """
    config = suggested(with_classes(config, images), images)
    side, batch = config.data.image_size, config.optim.batch_size
    assert side is not None
    fits = largest_batch(config, side, torch.bfloat16, CARD_BYTES)
    steps = max(1, len(images) // batch)
    lines = [
        f"estimates for --method {config.method} --recipe {config.recipe} in bf16 on a card of 24 GB, computed and not "
        "measured:",
        f"  take --image-size {side} --stem {config.model.stem} --batch-size {batch}; the largest batch is about "
        f"{fits // 8 * 8:,}",
    ]
    for arch in CARDS:
        peaks = nominal_peaks(arch, "bf16")
        epoch = steps * least_seconds(config, side, torch.bfloat16, peaks)
        slow, fast = (epoch / share for share in REACHED)
        lines.append(
            f"  an epoch of {steps:,} step{'s' * (steps != 1)} on an {peaks.name}: {duration(fast)} compiled to "
            f"{duration(slow)} eager, at {REACHED[1]:.0%} and {REACHED[0]:.0%} of the roofline; the loader must then "
            f"deliver {len(images) / fast:,.0f} images/s"
        )
    return lines
