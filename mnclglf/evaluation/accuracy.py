"""Top-1 and top-5 accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Fractions of the test images, 0 to 1."""

    top1: float
    """The class with the highest score is the right one."""
    top5: float
    """The right class is among the five with the highest scores."""
    note: str = ""
    """A warning to show beside the numbers, as that a fit stopped early; else empty."""


def accuracy_of_scores(scores: Tensor, labels: Tensor) -> Accuracy:
    """Top-1 and top-5 accuracy of [n, classes] scores against [n] labels.

    Of equal scores the lower class comes first. A class with the score -inf was never an option and is never right,
    so that a top-5 hit cannot come from filling up five places.
    """
    own = scores.gather(1, labels[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    before = ((scores > own) | ((scores == own) & lower)).sum(dim=1)
    possible = own[:, 0] > -math.inf
    top1, top5 = ((possible & (before < places)).double().mean().item() for places in (1, 5))
    return Accuracy(top1=top1, top5=top5)
