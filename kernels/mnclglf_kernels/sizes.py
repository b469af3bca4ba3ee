"""Sizes of a training step that its operators need."""

from __future__ import annotations

from typing import NamedTuple

VIEWS_PER_IMAGE = 3  # per training step


class Sizes(NamedTuple):
    """Sizes of a step.

    Attributes:
        images: N.
        side: side of the views in pixels.
        features: F, feature width.
        k: patches per combination.
        width: D, embedding width.
        queue: K, rows of the queue.
        source: side of the stored images in pixels.
    """

    images: int
    side: int
    features: int
    k: int
    width: int
    queue: int
    source: int = 32


PAPER = Sizes(images=256, side=32, features=512, k=2, width=2048, queue=16384)
