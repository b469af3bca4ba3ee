"""enqueue: the ring buffer of the feature queue (Algorithm 1, update_queue)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mnclglf_kernels.backend import Backend, resolve
from mnclglf_kernels.checks import check_matrix, check_widths


@torch.no_grad()
def enqueue(
    queue: Tensor, pointer: Tensor, rows: Tensor, *, should_update: Tensor | None = None, backend: Backend = "auto"
) -> None:
    """Writes `rows`, L2-normalized, over the queue's oldest rows and advances the pointer, both in place.

    Nothing is copied to the host.

    Args:
        queue: [K, D], any floating dtype. Rows pointer, pointer + 1, ... modulo K are overwritten.
        pointer: number of the oldest row, int64, 0-D, on the queue's device.
        rows: [N, D] with N <= K, normalized in fp32 (fp64 for fp64) and cast to the queue's dtype.
        should_update: bool, 0-D. If false, neither queue nor pointer changes. None always updates.
        backend: see `resolve`.

    Raises:
        ValueError: the shapes do not fit, or there are more rows than the queue has.
        TypeError: rows or queue are not floating point, pointer is not int64, or should_update is not bool.
    """
    check_matrix("queue", queue, "[K, D]")
    check_matrix("rows", rows, "[N, D]")
    check_widths("queue", queue, "rows", rows)
    size, count = queue.shape[0], rows.shape[0]
    if count > size:
        raise ValueError(f"{count} rows do not fit into a queue of {size}; enlarge the queue or enqueue fewer")
    if pointer.dtype != torch.int64 or pointer.dim() != 0:
        raise TypeError(f"pointer is {pointer.dtype} of shape {tuple(pointer.shape)}; it must be a 0-D int64 tensor")
    if should_update is not None and (should_update.dtype != torch.bool or should_update.dim() != 0):
        raise TypeError(
            f"should_update is {should_update.dtype} of shape {tuple(should_update.shape)}; it must be 0-D bool"
        )
    if not count:
        return
    gate = () if should_update is None else (should_update,)
    if resolve(backend, queue, pointer, rows, *gate) == "triton":
        torch.ops.mnclglf.enqueue(queue, pointer, rows, should_update)
        return
    where = (pointer + torch.arange(count, device=queue.device)).remainder_(size)
    values = F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32))).to(queue.dtype)
    if should_update is not None:
        values = torch.where(should_update, values, queue[where])
    queue.index_copy_(0, where, values)
    pointer.add_(count if should_update is None else count * should_update).remainder_(size)
