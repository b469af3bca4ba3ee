"""The nearest-neighbor lookup NN(Q, z) of Algorithm 1."""

from __future__ import annotations

import torch
from torch import Tensor

from mnclglf_kernels.backend import CPU_MULTIPLIES_BF16, Backend, resolve
from mnclglf_kernels.checks import check_matrix, check_queue

CHUNK = 4096  # queue rows at a time: 512 queries' scores stay in a cache
CANDIDATES = 16  # a query, in a chunk: beyond them one matmul is cheaper than gathering rows


@torch.no_grad()
def nearest_neighbor(queries: Tensor, queue: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Row of the queue with the greatest cosine similarity to each query (Algorithm 1, NN).

    The queue's rows have unit norm, so a query's own norm does not change its answer. Scores are fp32 (fp64 for fp64);
    the lowest row wins a tie; a NaN score never wins, and a query whose scores are all NaN gets row 0. The [M, K]
    scores are never in memory at once.

    Args:
        queries: [M, D], any floating dtype.
        queue: [K, D] of unit-norm rows, any floating dtype.
        backend: see `resolve`; "faiss" is exact search, on the GPU in the queue's dtype and in place, on the CPU in
            fp32. What it does with ties and NaN on a GPU is its own.

    Returns:
        [M] int64 rows of the queue.

    Raises:
        ValueError: shapes that do not fit, or an empty queue.
        TypeError: a dtype that is not floating point.
        RuntimeError: a backend that cannot run here.
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
    """(greatest score, its lowest column) of each row of [M, B], which is overwritten where it holds NaN."""
    top, row = scores.masked_fill_(scores.isnan(), -torch.inf).max(dim=1)
    return top, row


@torch.library.custom_op("mnclglf::screened_nearest_neighbor", mutates_args=())
def screened_nearest_neighbor(queries: Tensor, queue: Tensor) -> Tensor:
    """The lookup on a CPU that multiplies bf16: a bf16 matmul leaves a few candidates, whose scores are fp32.

    bf16 rounds by up to 2^-8 of a number. So the rough score of a row is off by at most what rounding took from the
    query, 2^-8 ||q|| [the row rounded], D 2^-24 ||q|| [fp32 sum] and 2^-8 |score| [result rounded]. A row whose rough
    score is below the greatest one by more than twice that is not the nearest, and what is left is compared in fp32:
    the answer is that of fp32 scores.
    """
    with torch.autocast("cpu", enabled=False):
        exact = unit_scale(queries.float())
        rough = exact.bfloat16()
        norm, taken = exact.norm(dim=1), (exact - rough.float()).norm(dim=1)
        rounded = taken if queue.dtype == torch.bfloat16 else taken + 2**-8 * norm
        # 1.01: stored rows have norm 1 to 2^-8.
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
    """Rows [M, D] times a power of two each, so that the greatest element is in 1/2 to 1: exact, and no product of it
    underflows."""
    exponent = torch.frexp(rows.abs().amax(dim=1, keepdim=True)).exponent.clamp(-120, 120)
    return torch.ldexp(rows, -exponent)


@screened_nearest_neighbor.register_fake
def _(queries: Tensor, queue: Tensor) -> Tensor:
    return queries.new_empty((queries.shape[0],), dtype=torch.int64)
