"""Losses that contrast cosine similarities, in PyTorch.

Rows are L2-normalised with F.normalize's semantics. Everything is computed in fp32 (fp64 for fp64) also under autocast,
and the gradient reaches every side that asks for one.

Letters: N images, D embedding width, K queue rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al. 2020, SimCLR, equation 1 and Algorithm 1) of two views.

    A row's positive is that of its image in the other view; its candidates are all 2N rows but itself.

    Args:
        first: [N, D], view 1.
        second: [N, D], view 2.
        temperature: tau > 0.

    Returns:
        Scalar, the mean over all 2N rows.
    """
    with full_precision(first):
        rows = unit(torch.cat([first, second]))  # [2N, D]
        count = len(rows)
        itself = torch.eye(count, dtype=torch.bool, device=rows.device)
        logits = (rows @ rows.T / temperature).masked_fill(itself, -torch.inf)
        positives = torch.arange(count, device=rows.device).roll(count // 2)
        return F.cross_entropy(logits, positives)


def queue_contrastive_loss(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE with the negatives in a queue (He et al. 2020, MoCo, equation 1).

    Args:
        queries: q, [N, D].
        keys: k+, [N, D], the positive of each query.
        queue: [K, D] of unit-norm rows, any floating dtype: the negatives of every query.
        temperature: tau > 0.

    Returns:
        Scalar, the mean over queries.
    """
    with full_precision(queries):
        queries, keys = unit(queries), unit(keys)
        positives = (queries * keys).sum(dim=1) / temperature  # [N]
        negatives = queries @ queue.to(queries.dtype).T / temperature  # [N, K]
        return (torch.logaddexp(positives, negatives.logsumexp(dim=1)) - positives).mean()


def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean negative cosine similarity of [N, D] predictions and [N, D] targets, row by row: from -1 to 1.

    BYOL's squared distance of unit vectors (Grill et al. 2020, equation 2) is 2 more than twice this.
    """
    with full_precision(predictions):
        return -(unit(predictions) * unit(targets)).sum(dim=1).mean()


def unit(rows: Tensor) -> Tensor:
    """[M, D] rows over max(norm, 1e-12), in fp32 (fp64 for fp64)."""
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)))


def full_precision(rows: Tensor) -> AbstractContextManager[object]:
    """Within, products are not autocast. The meta device, on which a step is counted, has no autocast to switch off."""
    device = rows.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
