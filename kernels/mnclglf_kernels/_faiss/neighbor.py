"""Nearest-neighbor lookup with FAISS's exact search: knn_gpu on the ring buffer itself on CUDA, knn on the CPU.

FAISS is imported at the first search. Its import takes a second, which the other backends need not spend.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def resources(device: int) -> Any:
    """Returns FAISS's scratch memory on a GPU: one object per device, made once."""
    import faiss

    return faiss.StandardGpuResources()


@torch.library.custom_op("mnclglf::faiss_nearest_neighbor", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def nearest_neighbor(queries: Tensor, queue: Tensor) -> Tensor:
    """Returns the [M] int64 nearest queue rows of [M, D] queries in a [K, D] queue."""
    import faiss

    if not len(queries):
        return queries.new_empty((0,), dtype=torch.int64)
    if queue.is_cuda:
        importlib.import_module("faiss.contrib.torch_utils")  # knn_gpu takes tensors, on torch's current stream

        with torch.cuda.device(queue.device):
            _, rows = faiss.knn_gpu(
                resources(queue.device.index),
                queries.to(queue.dtype).contiguous(),
                queue,
                1,
                metric=faiss.METRIC_INNER_PRODUCT,
                device=queue.device.index,
            )
    else:
        faiss.omp_set_num_threads(torch.get_num_threads())
        # FAISS searches fp32 on the CPU: a queue in another dtype is converted at every call.
        query_values, queue_values = (x.float().contiguous().numpy() for x in (queries, queue))
        _, rows = faiss.knn(query_values, queue_values, 1, metric=faiss.METRIC_INNER_PRODUCT)
        rows = torch.from_numpy(rows)
    return rows.flatten().clamp_(min=0)  # FAISS returns -1 if no score is a number; the contract says row 0


@nearest_neighbor.register_fake
def _(queries: Tensor, queue: Tensor) -> Tensor:
    return queries.new_empty((queries.shape[0],), dtype=torch.int64)
