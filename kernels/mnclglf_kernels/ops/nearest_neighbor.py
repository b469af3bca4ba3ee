"""nearest_neighbor: the lookup NN(Q, z) of Algorithm 1."""

from __future__ import annotations

import torch
from torch import Tensor

from mnclglf_kernels.backend import CPU_MULTIPLIES_BF16, Backend, resolve
from mnclglf_kernels.checks import check_matrix, check_queue

CHUNK = 4096  # queue rows at a time, so that the scores of 512 queries stay in a cache
CANDIDATES = 16  # per query and chunk; with more, one matmul is cheaper than gathering rows


@torch.no_grad()
def nearest_neighbor(queries: Tensor, queue: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Returns the row of the queue with the greatest cosine similarity to each query (Algorithm 1, NN).

    The queue's rows have unit norm, and a query's own norm does not change its answer. Scores are fp32 (fp64 for fp64).
    The lowest row wins a tie. A NaN score never wins, and a query with only NaN scores gets row 0. The [M, K] scores
    are never in memory at once.

    Args:
        queries: [M, D], any floating dtype.
        queue: [K, D] of unit-norm rows, any floating dtype.
        backend: see `resolve`. "faiss" is exact search: on the GPU in place and in the queue's dtype, on the CPU in
            fp32. On a GPU, FAISS decides about ties and NaN.

    Returns:
        [M] int64 rows of the queue.

    Raises:
        ValueError: the shapes do not fit, or the queue is empty.
        TypeError: a dtype is not floating point.
        RuntimeError: the backend cannot run here.
    """
    check_matrix("queries", queries, "[M, D]")
    check_queue("queries", queries, queue)
    resolved = resolve(backend, queries, queue, kind="lookup")
    if queries.shape[0] == 0:
        return queries.new_empty((0,), dtype=torch.int64)
    if resolved == "triton":
        return torch.ops.mnclglf.nearest_neighbor(queries, queue)
    if resolved == "faiss":
        return torch.ops.mnclglf.faiss_nearest_neighbor(queries, queue)
    dtype = torch.promote_types(torch.promote_types(queries.dtype, queue.dtype), torch.float32)
    if queue.device.type == "cpu" and dtype == torch.float32 and CPU_MULTIPLIES_BF16:
        return screened_nearest_neighbor(queries, queue)
    best = torch.full(queries.shape[:1], -torch.inf, dtype=dtype, device=queries.device)
    nearest = torch.zeros_like(best, dtype=torch.int64)
    with torch.autocast(queries.device.type, enabled=False):
        for first in range(0, queue.shape[0], CHUNK):
            top, row = best_of(queries.to(dtype) @ queue[first : first + CHUNK].to(dtype).T)
            nearest = torch.where(top > best, first + row, nearest)
            best = torch.maximum(top, best)
    return nearest


def best_of(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (greatest score, its lowest column) of each row of [M, B] scores; overwrites NaN in place."""
    top, row = scores.masked_fill_(scores.isnan(), -torch.inf).max(dim=1)
    return top, row


@torch.library.custom_op("mnclglf::screened_nearest_neighbor", mutates_args=())
def screened_nearest_neighbor(queries: Tensor, queue: Tensor) -> Tensor:
    """Lookup on a CPU that multiplies bf16: a bf16 matmul selects a few candidates, whose scores are computed in fp32.

    bf16 rounds by up to 2^-8 of a number. The error of a rough score is at most the sum of four terms: the norm of what
    rounding took from the query, 2^-8 ||q|| for the rounded row, D 2^-24 ||q|| for the fp32 sum, and 2^-8 |score| for
    the rounded result. A row whose rough score is below the greatest one by more than twice that cannot be the nearest.
    The others are compared in fp32, so the answer is that of fp32 scores.
    """
    with torch.autocast("cpu", enabled=False):
        exact = unit_scale(queries.float())
        rough = exact.bfloat16()
        norm, taken = exact.norm(dim=1), (exact - rough.float()).norm(dim=1)
        rounded = taken if queue.dtype == torch.bfloat16 else taken + 2**-8 * norm
        # 1.01: the norms of stored rows are within 2^-8 of 1.
        margin = 2 * 1.01 * rounded + 2**-23 * queries.shape[1] * norm
        best = torch.full((len(queries),), -torch.inf)
        nearest = torch.zeros(len(queries), dtype=torch.int64)
        for first in range(0, len(queue), CHUNK):
            keys = queue[first : first + CHUNK]
            scores = (rough @ keys.bfloat16().T).nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            top = torch.maximum(scores.amax(dim=1).float(), best)
            threshold = top - 2**-6 * top.abs() - margin  # 3 * 2^-8 < 2^-6: the threshold is rounded to bf16 too
            query, key = (scores >= threshold.bfloat16()[:, None]).nonzero(as_tuple=True)
            if len(query) > CANDIDATES * len(queries):
                top, row = best_of(exact @ keys.float().T)
            else:
                score = (exact[query] * keys[key].float()).sum(dim=1).nan_to_num_(-torch.inf, torch.inf, -torch.inf)
                top = best.scatter_reduce(0, query, score, "amax")
                won = score == top[query]
                row = torch.full_like(nearest, len(keys)).scatter_reduce(0, query[won], key[won], "amin")
            nearest = torch.where(top > best, first + row, nearest)
            best = torch.maximum(top, best)
    return nearest


def unit_scale(rows: Tensor) -> Tensor:
    """Scales each of [M, D] rows by a power of two, so that its greatest element is in 1/2 to 1.

    This is exact, and no product of such elements underflows.
    """
    exponent = torch.frexp(rows.abs().amax(dim=1, keepdim=True)).exponent.clamp(-120, 120)
    return torch.ldexp(rows, -exponent)


@screened_nearest_neighbor.register_fake
def _(queries: Tensor, queue: Tensor) -> Tensor:
    return queries.new_empty((queries.shape[0],), dtype=torch.int64)
