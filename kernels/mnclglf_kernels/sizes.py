"""The sizes of a training step that its operators see, and the operators' names."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Operator = Literal["divide", "combine", "contrastive_losses", "nearest_neighbor", "enqueue"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)


class Sizes(NamedTuple):
    """N images, their side, F of their features, k of the combinations, D of the embeddings, K queue rows."""

    images: int
    side: int
    features: int
    k: int
    width: int
    queue: int


PAPER = Sizes(images=256, side=32, features=512, k=2, width=2048, queue=16384)
