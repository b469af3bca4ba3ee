"""The contrastive loss L of Algorithm 1 (equation 1 with the rows of p as candidates)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mnclglf_kernels.backend import Backend, resolve
from mnclglf_kernels.checks import check_matrix, check_widths


def contrastive_loss(targets: Tensor, predictions: Tensor, temperature: float, *, backend: Backend = "auto") -> Tensor:
    """L(h, p) of Algorithm 1: cross-entropy of cosine similarities, averaged over rows and over the S splits.

    Both sides are L2-normalised with F.normalize's semantics. Row i of every split of N target rows has prediction i
    as its positive and the other predictions as its negatives. Computed in fp32 (fp64 for fp64) also under autocast;
    the gradient reaches either side that asks for one.

    Args:
        targets: h, [S * N, D].
        predictions: p, [N, D].
        temperature: tau > 0.
        backend: see `resolve`.

    Returns:
        Scalar, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: shapes that do not fit each other, or a temperature that is not positive.
        TypeError: a dtype that is not floating point.
    """
    check_matrix("targets", targets, "[S * N, D]")
    check_matrix("predictions", predictions, "[N, D]")
    check_widths("targets", targets, "predictions", predictions)
    rows, candidates = targets.shape[0], predictions.shape[0]
    if candidates == 0 or rows == 0 or rows % candidates:
        raise ValueError(f"{rows} target rows are no positive multiple of {candidates} prediction rows")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be positive")
    resolve(backend, predictions)
    dtype = torch.promote_types(torch.promote_types(targets.dtype, predictions.dtype), torch.float32)
    with torch.autocast(predictions.device.type, enabled=False):
        logits = F.normalize(targets.to(dtype)) @ F.normalize(predictions.to(dtype)).T / temperature
        labels = torch.arange(candidates, device=logits.device).repeat(rows // candidates)
        return F.cross_entropy(logits, labels)
