"""The sizes of a training step, as its operators see them."""

from __future__ import annotations

from typing import NamedTuple

VIEWS_PER_IMAGE = 3  # in a step


class Sizes(NamedTuple):
    """N images, the side of their views, F of their features, k of the combinations, D of the embeddings, K queue rows.

    `source` is the side of the images that views are made of.
    """

    images: int
    side: int
    features: int
    k: int
    width: int
    queue: int
    source: int = 32


PAPER = Sizes(images=256, side=32, features=512, k=2, width=2048, queue=16384)
