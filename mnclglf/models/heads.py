"""Projector and predictor (paper, section 4.1, Architecture)."""

from __future__ import annotations

from torch import nn

from mnclglf.models.batch_norm import without_batch_counters


def projector(features: int, width: int) -> nn.Sequential:
    """Returns g: [N, features] to [N, width], three layers with batch norm after each, ReLU after the first two.

    The linear layers have no bias: the batch norm after them would subtract it.
    """
    head = nn.Sequential(
        nn.Linear(features, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
    )
    without_batch_counters(head)
    return head


def predictor(width: int, hidden: int) -> nn.Sequential:
    """Returns q: [N, width] to [N, width] through `hidden`, with batch norm and ReLU between the two layers."""
    head = nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width)
    )
    without_batch_counters(head)
    return head
