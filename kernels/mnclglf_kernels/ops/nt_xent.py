"""nt_xent: the loss of SimCLR (Chen et al. 2020, equation 1 and Algorithm 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mnclglf_kernels.backend import Backend, resolve
from mnclglf_kernels.checks import check_matrix, check_rank, check_rows, check_temperature, check_widths


def nt_xent(
    first: Tensor,
    second: Tensor,
    temperature: float,
    *,
    rank: int = 0,
    ranks: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """Returns the cross-entropy of cosine similarities between the 2N rows of two views (SimCLR, equation 1).

    A row's positive is the row of the same image in the other view. Its candidates are all 2N rows but itself. Rows are
    L2-normalized with F.normalize's semantics. It is computed in fp32 (fp64 for fp64), even under autocast. Each view
    that requires a gradient gets one.

    In a run over several ranks each one calls it with the rows of all ranks and takes the mean over those of its own
    N / ranks images. The mean over the ranks of these losses is the loss of the whole batch.

    Args:
        first: [N, D], view 1 of all images, one rank's after the other's.
        second: [N, D], view 2.
        temperature: tau > 0.
        rank: the part of the images whose rows the mean is taken over: N / ranks of them from rank * N / ranks on.
        ranks: number of parts.
        backend: see `resolve`.

    Returns:
        Scalar, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: the shapes do not fit each other or the ranks, or the temperature is not positive.
        TypeError: a dtype is not floating point.
        RuntimeError: the backend cannot run here.
    """
    check_matrix("first", first, "[N, D]")
    check_matrix("second", second, "[N, D]")
    check_widths("first", first, "second", second)
    check_rows("first", first, "second", second)
    check_rank(rank, ranks, "first", first)
    check_temperature(temperature)
    resolved = resolve(backend, first, second, kind="matmul")
    rows = torch.cat([first, second])
    if resolved == "torch":
        return torch_nt_xent(rows, temperature, rank, ranks)
    losses, *_ = torch.ops.mnclglf.nt_xent(rows, temperature, rank, ranks)
    return losses[0]


def torch_nt_xent(rows: Tensor, temperature: float, rank: int, ranks: int) -> Tensor:
    """Computes NT-Xent of [2N, D] rows, view 1 above view 2, in PyTorch."""
    with torch.autocast(rows.device.type, enabled=False):
        unit = F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        columns = torch.arange(len(unit), device=unit.device)
        own = part_of(columns, rank, ranks)
        logits = (part_of(unit, rank, ranks) @ unit.T / temperature).masked_fill(own[:, None] == columns, -torch.inf)
        positives = part_of(columns.roll(len(unit) // 2), rank, ranks)
        return F.cross_entropy(logits, positives)


def part_of(rows: Tensor, rank: int, ranks: int) -> Tensor:
    """Returns a rank's rows of both views, [2N / ranks, ...] of [2N, ...]."""
    return rows.unflatten(0, (2, ranks, -1))[:, rank].flatten(0, 1)
