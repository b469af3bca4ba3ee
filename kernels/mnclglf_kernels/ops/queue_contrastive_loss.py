"""queue_contrastive_loss: InfoNCE with negatives from a queue, the loss of MoCo (He et al. 2020, equation 1)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnclglf_kernels.backend import Backend, resolve
from mnclglf_kernels.checks import check_matrix, check_queue, check_rows, check_temperature, check_widths

CHUNK = 4096  # queue rows at a time


def queue_contrastive_loss(
    queries: Tensor, keys: Tensor, queue: Tensor, temperature: float, *, backend: Backend = "auto"
) -> Tensor:
    """Returns MoCo's loss (equation 1): mean cross-entropy with the key as positive and the queue as negatives.

    Queries and keys are L2-normalized with F.normalize's semantics. It is computed in fp32 (fp64 for fp64), even under
    autocast. Queries and keys that require a gradient get one; the queue never does. The [N, 1 + K] logits are never in
    memory at once.

    Args:
        queries: q, [N, D].
        keys: k+, [N, D], the positive of each query.
        queue: [K, D] of unit-norm rows, any floating dtype: the negatives of every query. For "triton" it must be
            contiguous.
        temperature: tau > 0.
        backend: see `resolve`.

    Returns:
        Scalar, the mean over queries, fp32 (fp64 for fp64 queries or keys).

    Raises:
        ValueError: the shapes do not fit each other, the queue is empty, or the temperature is not positive.
        TypeError: a dtype is not floating point.
        RuntimeError: the backend cannot run here.
    """
    check_matrix("queries", queries, "[N, D]")
    check_matrix("keys", keys, "[N, D]")
    check_widths("queries", queries, "keys", keys)
    check_rows("queries", queries, "keys", keys)
    check_queue("queries", queries, queue)
    check_temperature(temperature)
    dtype, queue = torch.promote_types(queries.dtype, keys.dtype), queue.detach()
    if resolve(backend, queries, keys, queue, kind="matmul") == "torch":
        return torch_queue_contrastive_loss(queries, keys, queue, temperature)
    dense = (rows.to(dtype).contiguous() for rows in (queries, keys))
    losses, *_ = torch.ops.mnclglf.queue_contrastive_loss(*dense, queue, temperature)
    return losses.mean()


def torch_queue_contrastive_loss(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Computes the loss in PyTorch."""
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = (F.normalize(rows.to(dtype)) for rows in (queries, keys))
        positives = (queries * keys).sum(dim=1) / temperature  # [N]
        negatives = cast(Tensor, LogSumExp.apply(queries, queue, temperature))
        # The positive's softmax is a sigmoid of (positive - log-sum-exp of the negatives), and logsigmoid is accurate
        # even if the sigmoid is close to 1: nothing cancels.
        return -F.logsigmoid(positives - negatives).mean()


class LogSumExp(torch.autograd.Function):
    """Log-sum-exp [N] of the products of [N, D] queries with a [K, D] queue, divided by the temperature.

    One pass over the queue computes value and gradient. Its sums are kept relative to the greatest logit so far (online
    softmax, Milakov and Gimelshein 2018).
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, queue: Tensor, temperature: float) -> Tensor:
        greatest = queries.new_full((len(queries), 1), -torch.inf)
        total, weighted = torch.zeros_like(greatest), torch.zeros_like(queries)
        for rows in queue.split(CHUNK):
            rows = rows.to(queries.dtype)
            logits = queries @ rows.T / temperature
            before, greatest = greatest, torch.maximum(greatest, logits.amax(dim=1, keepdim=True))
            shrunk, weights = (before - greatest).exp(), (logits - greatest).exp()
            total = shrunk * total + weights.sum(dim=1, keepdim=True)
            if ctx.needs_input_grad[0]:
                weighted = torch.addmm(shrunk * weighted, weights, rows)
        ctx.save_for_backward(weighted / (total * temperature))
        return (greatest + total.log()).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return upstream[0][:, None] * gradient, None, None
