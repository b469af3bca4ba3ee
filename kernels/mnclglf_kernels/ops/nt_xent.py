"""nt_xent: the loss of SimCLR (Chen et al. 2020, equation 1 and Algorithm 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mnclglf_kernels.backend import Backend, resolve
from mnclglf_kernels.checks import check_matrix, check_rows, check_temperature, check_widths


def nt_xent(first: Tensor, second: Tensor, temperature: float, *, backend: Backend = "auto") -> Tensor:
    """Returns the cross-entropy of cosine similarities between the 2N rows of two views (SimCLR, equation 1).

    A row's positive is the row of the same image in the other view. Its candidates are all 2N rows but itself. Rows are
    L2-normalized with F.normalize's semantics. It is computed in fp32 (fp64 for fp64), even under autocast. Each view
    that requires a gradient gets one.

    Args:
        first: [N, D], view 1.
        second: [N, D], view 2.
        temperature: tau > 0.
        backend: see `resolve`.

    Returns:
        Scalar, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: the shapes do not fit each other, or the temperature is not positive.
        TypeError: a dtype is not floating point.
        RuntimeError: the backend cannot run here.
    """
    check_matrix("first", first, "[N, D]")
    check_matrix("second", second, "[N, D]")
    check_widths("first", first, "second", second)
    check_rows("first", first, "second", second)
    check_temperature(temperature)
    resolved = resolve(backend, first, second, kind="matmul")
    rows = torch.cat([first, second])
    if resolved == "torch":
        return torch_nt_xent(rows, temperature)
    losses, *_ = torch.ops.mnclglf.nt_xent(rows, temperature)
    return losses[0]


def torch_nt_xent(rows: Tensor, temperature: float) -> Tensor:
    """Computes NT-Xent of [2N, D] rows, view 1 above view 2, in PyTorch."""
    with torch.autocast(rows.device.type, enabled=False):
        unit = F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        count = len(unit)
        itself = torch.eye(count, dtype=torch.bool, device=unit.device)
        logits = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf)
        positives = torch.arange(count, device=unit.device).roll(count // 2)
        return F.cross_entropy(logits, positives)
