"""Figures that tell a healthy run from a collapsing one; each waits for the device, so they are logged seldom."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Returns the spread of the L2-normalized rows of [N, F]: mean standard deviation of a feature times sqrt(F).

    About 1 for directions spread evenly, 0 for a collapsed encoder (Chen and He 2021, section 4.1).
    """
    rows = F.normalize(features.float())
    return float(rows.std(dim=0).mean() * rows.shape[1] ** 0.5)


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """Returns the effective rank of [N, F], at most min(N, F): exp of the entropy of the normalized singular values.

    Source: Roy and Vetterli 2007.
    """
    values = torch.linalg.svdvals(features.float())
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


@torch.no_grad()
def neighbor_agreement(neighbors: Tensor, indices: Tensor, labels: Tensor) -> float | None:
    """Returns the fraction of nearest neighbors that have the label of their query, random rows left out.

    Args:
        neighbors: [N] data-set index of each nearest neighbor, -1 for a random row.
        indices: [N] data-set index of each query.
        labels: [n] labels of the data set.

    Returns:
        None while every neighbor is random.
    """
    known = neighbors >= 0
    if not known.any():
        return None
    return float((labels[neighbors[known]] == labels[indices[known]]).float().mean())
