"""Weighted k-nearest-neighbor classification (Wu et al. 2018, section 3.4; the monitor of MoCo and SimSiam)."""

# n train rows, m test rows, F feature width, k neighbors

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mnclglf.evaluation.accuracy import Accuracy, accuracy_of_scores
from mnclglf.evaluation.features import check_sets

CHUNK_SIMILARITIES = 2**25  # similarities in memory at once: 128 MB in fp32
CHUNK_VOTES = 2**23  # single votes, rows x k x classes, in memory at once: 64 MB in fp64


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

    Ties go to the earlier row and to the lower class. A class without a vote is never one of the top 5; the usual code
    fills these places with arbitrary classes.

    Args:
        train_features: train rows [n, F], on the device to compute on.
        train_labels: train labels, int64 [n].
        test_features: test rows [m, F].
        test_labels: test labels, int64 [m].
        classes: number of classes.
        k: number of neighbors that vote, at most n.
        temperature: temperature of the votes.

    Raises:
        ValueError: k or temperature is out of range, or the sets are empty, not finite or do not match.
    """
    check_sets(train_features, train_labels, test_features, test_labels, classes)
    scores = knn_scores(train_features, train_labels, test_features, classes=classes, k=k, temperature=temperature)
    return accuracy_of_scores(scores, test_labels.to(scores.device))


def knn_scores(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Returns the votes of `weighted_knn`, fp64 [m, classes], on the device of the train features.

    Raises:
        ValueError: k or temperature is out of range.
    """
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
    return torch.cat(votes)


def _votes(similarities: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Returns the votes, fp64 [m, classes], from [m, n] similarities; -inf for a class without a vote."""
    votes = similarities.new_empty(len(similarities), classes, dtype=torch.float64)
    neighbors = nearest_columns(similarities, k)
    near = similarities.gather(1, neighbors).double()
    # The largest weight is a common factor of the votes: without it exp overflows.
    weights = ((near - near.amax(dim=1, keepdim=True)) / temperature).exp()
    rows = max(1, CHUNK_VOTES // (k * classes))
    for part, of, weight in zip(votes.split(rows), labels[neighbors].split(rows), weights.split(rows), strict=True):
        chosen = F.one_hot(of, classes)
        part.copy_((chosen * weight[..., None]).sum(dim=1).masked_fill(chosen.sum(dim=1) == 0, -math.inf))
    return votes


def nearest_columns(similarities: Tensor, k: int) -> Tensor:
    """Returns the columns of the k highest values in each row of [m, n], as [m, k]; ties go to the first columns.

    topk does not specify its choice among equal values, so rows with a tie at the k-th place are redone here.
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
