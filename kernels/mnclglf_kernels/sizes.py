"""Sizes of a training step that its operators need."""

from __future__ import annotations

from typing import NamedTuple


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
        views: views per image.
    """

    images: int
    side: int
    features: int
    k: int
    width: int
    queue: int
    source: int = 32
    views: int = 3


PAPER = Sizes(images=256, side=32, features=512, k=2, width=2048, queue=16384)
