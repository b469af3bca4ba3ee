"""Weighted k-nearest-neighbor classification (Wu et al. 2018, section 3.4; the monitor of MoCo and SimSiam)."""

# n train rows, m test rows, F feature width, k neighbors

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mnclglf.evaluation.accuracy import Accuracy, accuracy_of_scores
from mnclglf.evaluation.features import check_sets

CHUNK_SIMILARITIES = 2**25  # held at once: 128 MB of fp32


def weighted_knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Accuracy:
    """Classifies test rows by votes of their k nearest train rows, exp(s / temperature) for cosine similarity s.

    Of equally near rows the earlier is taken, of classes with equal votes the lower. A class without a vote does not
    count as one of the five of top-5; the usual code fills such places with whatever sorting leaves there.

    Args:
        train_features: [n, F], on the device that does the work.
        train_labels: [n] int64.
        test_features: [m, F].
        test_labels: [m] int64.
        classes: number of classes.
        k: neighbors that vote, at most n.
        temperature: temperature of the votes.

    Raises:
        ValueError: k or temperature out of range, or sets that are empty, not finite or do not fit together.
    """
    check_sets(train_features, train_labels, test_features, test_labels, classes)
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k {k} must lie in 1..{len(train_features)}, the number of train rows")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be positive, as in 0.07")
    device = train_features.device
    train, train_labels = F.normalize(train_features.float()), train_labels.to(device)
    votes = [
        _votes(F.normalize(chunk.to(device).float()) @ train.T, train_labels, classes, k, temperature)
        for chunk in test_features.split(max(1, CHUNK_SIMILARITIES // len(train)))
    ]
    return accuracy_of_scores(torch.cat(votes), test_labels.to(device))


def _votes(similarities: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Returns fp64 [m, classes] votes of [m, n] similarities; -inf for a class without one."""
    neighbors = nearest_columns(similarities, k)
    near = similarities.gather(1, neighbors).double()
    weights = ((near - near.amax(dim=1, keepdim=True)) / temperature).exp()  # a common factor keeps exp from overflow
    chosen = F.one_hot(labels[neighbors], classes)
    votes = (chosen * weights[..., None]).sum(dim=1)
    return votes.masked_fill(chosen.sum(dim=1) == 0, -math.inf)


def nearest_columns(similarities: Tensor, k: int) -> Tensor:
    """Returns the [m, k] columns with the highest values of each row of [m, n]; of equal values the first columns.

    topk leaves open which of several equal values it takes, so rows with a tie at the k-th place are decided here.
    """
    values, columns = similarities.topk(k, dim=1)
    least = values[:, -1:]
    tied = (similarities >= least).sum(dim=1) > k
    if tied.any():
        rows, least = similarities[tied], least[tied]
        above, equal = rows > least, rows == least
        free = k - above.sum(dim=1, keepdim=True)
        taken = above | (equal & (equal.cumsum(dim=1) <= free))
        columns[tied] = taken.nonzero()[:, 1].view(-1, k)
    return columns
