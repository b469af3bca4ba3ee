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
    """Fraction whose label has the highest score."""
    top5: float
    """Fraction whose label is among the five highest scores."""
    note: str = ""
    """Warning to show beside the numbers, e.g. that a fit stopped early; else empty."""


def accuracy_of_scores(scores: Tensor, labels: Tensor) -> Accuracy:
    """Returns top-1 and top-5 accuracy of [n, classes] scores against [n] labels.

    Equal scores rank by class number. A class with the score -inf is never right: it must not become a top-5 hit only
    because fewer than five classes have a score.
    """
    own = scores.gather(1, labels[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    before = ((scores > own) | ((scores == own) & lower)).sum(dim=1)
    possible = own[:, 0] > -math.inf
    top1, top5 = ((possible & (before < places)).double().mean().item() for places in (1, 5))
    return Accuracy(top1=top1, top5=top5)
