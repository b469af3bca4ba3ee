"""Projector and predictor (paper, section 4.1, Architecture)."""

from __future__ import annotations

from torch import nn

from mnclglf.models.batch_norm import BatchNorm, Stack, without_batch_counters


def projector(features: int, width: int) -> Stack:
    """Returns g: [N, features] to [N, width], three layers with batch norm after each, ReLU after the first two.

    The linear layers have no bias: the batch norm after them would subtract it.
    """
    head = Stack(
        nn.Linear(features, width, bias=False),
        BatchNorm(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        BatchNorm(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        BatchNorm(width),
    )
    without_batch_counters(head)
    return head


def predictor(width: int, hidden: int) -> Stack:
    """Returns q: [N, width] to [N, width] through `hidden`, with batch norm and ReLU between the two layers."""
    head = Stack(nn.Linear(width, hidden, bias=False), BatchNorm(hidden), nn.ReLU(), nn.Linear(hidden, width))
    without_batch_counters(head)
    return head
