"""The nearest-neighbor lookup NN(Q, z) of Algorithm 1."""

from __future__ import annotations

import torch
from torch import Tensor

from mnclglf_kernels.backend import Backend, resolve
from mnclglf_kernels.checks import check_matrix, check_widths


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
        TypeError: a dtype that is not floating point.
    """
    check_matrix("queries", queries, "[M, D]")
    check_matrix("queue", queue, "[K, D]")
    check_widths("queries", queries, "queue", queue)
    if queue.shape[0] == 0:
        raise ValueError(f"queue has shape {tuple(queue.shape)}; it needs at least one row")
    resolve(backend, queries)
    dtype = torch.promote_types(torch.promote_types(queries.dtype, queue.dtype), torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries.to(dtype) @ queue.to(dtype).T
    return scores.masked_fill_(scores.isnan(), -torch.inf).argmax(dim=1)
