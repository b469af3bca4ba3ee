"""enqueue in Triton: one launch normalizes the rows and writes them into the ring, a second advances the pointer.

N rows, K queue rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnclglf_kernels._triton import launch
from mnclglf_kernels._triton.launch import Launch, Traffic, sum_dtype

FLOOR = tl.constexpr(1e-12)  # eps of torch.nn.functional.normalize


@triton.jit
def enqueue_write_kernel(
    queue,
    pointer,
    should_update,
    rows,
    K: tl.constexpr,
    D: tl.constexpr,
    QUEUE_STRIDE: tl.constexpr,  # row stride and column stride, in elements
    QUEUE_COLUMN: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    ROW_COLUMN: tl.constexpr,
    GATED: tl.constexpr,
    SUM: tl.constexpr,  # dtype of the norm's sum
    BLOCK: tl.constexpr,  # the next power of two from D
):
    """Writes row n of `rows`, normalized, to row (pointer + n) % K of the queue; one program per row.

    A program holds its whole row in registers: the row is read once for both its norm and its values.
    """
    # int64: row number times row stride passes 2^31 for a large queue.
    n = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK).to(tl.int64)
    inside = column < D
    if GATED:  # a closed gate masks all loads and stores: the host need not read it, so nothing synchronizes
        inside &= tl.load(should_update) != 0
    values = tl.load(rows + n * ROW_STRIDE + column * ROW_COLUMN, mask=inside, other=0.0).to(SUM)
    norm = tl.sqrt(tl.sum(values * values, 0))
    place = (tl.load(pointer) + n) % K
    unit = values / tl.where(norm < FLOOR, FLOOR, norm)  # tl.where, not tl.maximum: a NaN norm stays NaN
    if queue.dtype.element_ty != tl.float64:
        unit = unit.to(tl.float32)  # fp64 has no conversion to bf16
    tl.store(queue + place * QUEUE_STRIDE + column * QUEUE_COLUMN, unit, mask=inside)


@triton.jit
def enqueue_advance_kernel(pointer, should_update, N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr):
    """Advances the pointer by N modulo K, in a launch of its own.

    Every program of enqueue_write_kernel reads the old pointer, and programs of one launch have no order.
    """
    kept = True
    if GATED:
        kept = tl.load(should_update) != 0
    before = tl.load(pointer)
    tl.store(pointer, tl.where(kept, (before + N) % K, before))


def write_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    rows, gate = a["rows"], a["should_update"].itemsize if a["GATED"] else 0
    moved = rows.numel() * (rows.itemsize + a["queue"].itemsize)
    return Traffic(0, moved + 8 + gate, moved + len(rows) * (8 + gate))


def advance_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    moved = 16 + (a["should_update"].itemsize if a["GATED"] else 0)
    return Traffic(0, moved, moved)


def enqueue_launches(queue: Tensor, pointer: Tensor, rows: Tensor, should_update: Tensor | None) -> list[Launch]:
    """The two launches of an enqueue."""
    size, width = queue.shape
    gate = dict(should_update=pointer if should_update is None else should_update, GATED=should_update is not None)
    write = dict(
        queue=queue,
        pointer=pointer,
        rows=rows,
        K=size,
        D=width,
        QUEUE_STRIDE=queue.stride(0),
        QUEUE_COLUMN=queue.stride(1),
        ROW_STRIDE=rows.stride(0),
        ROW_COLUMN=rows.stride(1),
        SUM=sum_dtype(rows),
        BLOCK=triton.next_power_of_2(width),
        **gate,
    )
    return [
        Launch(enqueue_write_kernel, write_traffic, (len(rows),), write),
        Launch(
            enqueue_advance_kernel, advance_traffic, (1,), dict(pointer=pointer, N=len(rows), K=size, **gate), warps=1
        ),
    ]


def launches(
    queue: Tensor, pointer: Tensor, rows: Tensor, should_update: Tensor | None = None, *, arch: int
) -> list[Launch]:
    """The launches of one call."""
    return enqueue_launches(queue, pointer, rows, should_update)


@torch.library.custom_op("mnclglf::enqueue", mutates_args=("queue", "pointer"))
def enqueue(queue: Tensor, pointer: Tensor, rows: Tensor, should_update: Tensor | None) -> None:
    """Writes [N, D] rows into the ring [K, D] and advances the pointer."""
    launch.run(enqueue_launches(queue, pointer, rows, should_update), queue.device)


@enqueue.register_fake
def _(queue: Tensor, pointer: Tensor, rows: Tensor, should_update: Tensor | None) -> None:
    return None
