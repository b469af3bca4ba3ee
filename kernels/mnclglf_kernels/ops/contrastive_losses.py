"""The contrastive loss L of Algorithm 1 (equation 1 with the rows of p as candidates)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mnclglf_kernels.backend import Backend, resolve
from mnclglf_kernels.checks import check_matrix, check_rank, check_temperature, check_widths

NORM_FLOOR = 1e-12  # eps of F.normalize


def contrastive_loss(
    targets: Tensor,
    predictions: Tensor,
    temperature: float,
    *,
    rank: int = 0,
    ranks: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """Returns L(h, p) of Algorithm 1: cross-entropy of cosine similarities, averaged over rows and over the S splits.

    Both sides are L2-normalized with F.normalize's semantics. Row i of every split of N target rows has prediction i
    as its positive and the other predictions as its negatives. It is computed in fp32 (fp64 for fp64), even under
    autocast. Each side that requires a gradient gets one.

    In a run over several ranks each one calls it with the predictions of all ranks and the targets of its own N / ranks
    images. The mean over the ranks of these losses is the loss of the whole batch.

    Args:
        targets: h, [S * N / ranks, D], of the images of `rank` only.
        predictions: p, [N, D], of all images, one rank's after the other's.
        temperature: tau > 0.
        rank: part of the images that the targets are of. Row i of a split has prediction rank * N / ranks + i as its
            positive.
        ranks: number of parts.
        backend: see `resolve`.

    Returns:
        Scalar, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: the shapes do not fit each other or the ranks, or the temperature is not positive.
        TypeError: a dtype is not floating point.
        RuntimeError: the backend cannot run here.
    """
    return contrastive_losses([(targets, predictions)], temperature, rank=rank, ranks=ranks, backend=backend)[0]


def contrastive_losses(
    pairs: Sequence[tuple[Tensor, Tensor]],
    temperature: float,
    *,
    rank: int = 0,
    ranks: int = 1,
    backend: Backend = "auto",
) -> list[Tensor]:
    """Returns `contrastive_loss` of several pairs; pairs that share N, D and dtype share their launches.

    The pairs may differ in S, and a tensor may be in several of them.

    Args:
        pairs: pairs of targets [S_i * N / ranks, D] and predictions [N, D].
        temperature: tau > 0, the same for all.
        rank, ranks: as in contrastive_loss.
        backend: see `resolve`.

    Returns:
        One scalar per pair, in their order.

    Raises:
        ValueError: as in contrastive_loss.
    """
    for targets, predictions in pairs:
        check_pair(targets, predictions, rank, ranks)
    check_temperature(temperature)
    if not pairs:
        return []
    if resolve(backend, *(rows for pair in pairs for rows in pair), kind="matmul") == "torch":
        return [torch_contrastive_loss(*pair, temperature, rank, ranks) for pair in pairs]
    losses: dict[int, Tensor] = {}
    for group in alike(pairs):
        dense = [[rows.to(common_dtype(*pairs[i])).contiguous() for rows in pairs[i]] for i in group]
        targets, predictions = ([pair[side] for pair in dense] for side in (0, 1))
        results = torch.ops.mnclglf.contrastive_losses(targets, predictions, temperature, rank, ranks)[0]
        losses.update(zip(group, results.unbind(), strict=True))
    return [losses[i] for i in range(len(pairs))]


def check_pair(targets: Tensor, predictions: Tensor, rank: int, ranks: int) -> None:
    """Raises ValueError or TypeError unless targets are [S * N / ranks, D] and predictions [N, D], floating point."""
    check_matrix("targets", targets, "[S * N, D]")
    check_matrix("predictions", predictions, "[N, D]")
    check_widths("targets", targets, "predictions", predictions)
    check_rank(rank, ranks, "predictions", predictions)
    rows, candidates = targets.shape[0], predictions.shape[0]
    if candidates == 0 or rows == 0 or rows % (candidates // ranks):
        each = "" if ranks == 1 else f" over {ranks} ranks, {candidates // ranks} each; give those of this rank alone"
        raise ValueError(f"{rows} target rows are not a positive multiple of {candidates} prediction rows{each}")


def alike(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[list[int]]:
    """Returns groups of pair numbers that share N, D and dtype, ordered by their first pair."""
    groups: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for i, (targets, predictions) in enumerate(pairs):
        groups.setdefault((predictions.shape, common_dtype(targets, predictions)), []).append(i)
    return list(groups.values())


def common_dtype(targets: Tensor, predictions: Tensor) -> torch.dtype:
    """Returns the dtype to which both promote."""
    return torch.promote_types(targets.dtype, predictions.dtype)


def torch_contrastive_loss(targets: Tensor, predictions: Tensor, temperature: float, rank: int, ranks: int) -> Tensor:
    """Computes one pair in PyTorch. Norms divide the [S * N, N] products: no normalized [S * N, D] rows are written."""
    dtype = torch.promote_types(common_dtype(targets, predictions), torch.float32)
    with torch.autocast(predictions.device.type, enabled=False):
        targets, predictions = targets.to(dtype), predictions.to(dtype)
        scale = inverse_norm(targets)[:, None] * (inverse_norm(predictions) / temperature)
        count = len(predictions) // ranks
        labels = torch.arange(rank * count, (rank + 1) * count, device=predictions.device)
        labels = labels.repeat(len(targets) // count)
        return F.cross_entropy(targets @ predictions.T * scale, labels)


def inverse_norm(rows: Tensor) -> Tensor:
    """Returns the [M] factors by which F.normalize scales [M, D] rows."""
    return torch.linalg.vector_norm(rows, dim=1).clamp_min(NORM_FLOOR).reciprocal()
