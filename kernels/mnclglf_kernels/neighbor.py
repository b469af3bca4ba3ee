"""The nearest-neighbor lookup NN(Q, z) of Algorithm 1."""

from __future__ import annotations

import torch
from torch import Tensor

from mnclglf_kernels.backend import Backend, resolve


@torch.no_grad()
def nearest_neighbor(queries: Tensor, queue: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Row of the queue with the greatest cosine similarity to each query (Algorithm 1, NN).

    The queue's rows have unit norm, so a query's own norm does not change its answer. Scores are fp32 (fp64 for fp64);
    the lowest row wins a tie; a NaN score never wins, and a query whose scores are all NaN gets row 0.

    Args:
        queries: [M, D], any floating dtype.
        queue: [K, D] of unit-norm rows, any floating dtype.
        backend: see `resolve`.

    Returns:
        [M] int64 rows of the queue.

    Raises:
        ValueError: shapes that do not fit, or an empty queue.
    """
    if queries.dim() != 2 or queue.dim() != 2 or queries.shape[1] != queue.shape[1] or queue.shape[0] == 0:
        raise ValueError(f"queries {tuple(queries.shape)} and queue {tuple(queue.shape)} must be [M, D] and [K, D], K > 0")
    resolve(backend, queries)
    dtype = torch.promote_types(torch.promote_types(queries.dtype, queue.dtype), torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries.to(dtype) @ queue.to(dtype).T
    return scores.masked_fill_(scores.isnan(), -torch.inf).argmax(dim=1)
