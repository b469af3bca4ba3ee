"""Losses in plain PyTorch, which need no operator of their own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean negative cosine similarity of [N, D] predictions and [N, D] targets, row by
    row: from -1 to 1.

    Rows are L2-normalized with F.normalize's semantics. Computed in fp32 (fp64 for fp64) also under autocast; the
    gradient reaches every side that asks for one. BYOL's squared distance of unit vectors (Grill et al. 2020, equation
    2) is 2 more than twice this.
    """
    with full_precision(predictions):
        return -(unit(predictions) * unit(targets)).sum(dim=1).mean()


def unit(rows: Tensor) -> Tensor:
    """Returns [M, D] rows over max(norm, 1e-12), in fp32 (fp64 for fp64)."""
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)))


def full_precision(rows: Tensor) -> AbstractContextManager[object]:
    """Context without autocast. The meta device, on which a step is counted, has no autocast to switch off."""
    device = rows.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
