"""queue_contrastive_loss in Triton: each query has its own positive, and all share the rows of the queue as negatives.

    forward       one program per tile of negative logits, which reduces it to parts of the log-sum-exp; query norms
    merge         one program per query: its positive logit, the log-sum-exp over it and the parts, the query's loss
    coefficients  recomputes the negative logits of one slice of the queue, as softmax
    sums          multiplies coefficients by the slice's rows and adds the sums of the slices before it
    gradient      one program per row: adds the positive's part and subtracts the radial part

Backward computes coefficients and sums slice by slice, so that [N, K] numbers are never in memory. N queries, K rows of
the queue or of a slice, D width. The queue's rows were normalized when they were written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnclglf_kernels._triton import launch
from mnclglf_kernels._triton.contrastive_losses import check_dense
from mnclglf_kernels._triton.launch import Launch, Traffic, architecture, blocks, total_bytes
from mnclglf_kernels._triton.products import CLAMPED, inverse_norm, row_products, weighted_rows
from mnclglf_kernels._triton.tiles import FP32_GRADIENT, SMALL, Tile, Tuning, register, tile
from mnclglf_kernels.backend import INTERPRETED

# The sums are [N, D] and few. Small tiles keep all SMs busy: 128 programs at the paper's sizes.
register("queue_sum", half=(SMALL, SMALL, SMALL), fp32=(FP32_GRADIENT, FP32_GRADIENT, FP32_GRADIENT))
COEFFICIENTS = 2**20  # per slice, at most: 4 MB, which fit the 6 MB of L2 on an RTX 3090


@triton.jit
def negative_products(
    queries,
    queue,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    NORMS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Returns (query numbers, queue row numbers, their products, squared norms of the queries) of one program."""
    # Queries are on axis 0, the fastest: consecutive programs share a tile of the queue, so DRAM is read once.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # Rows past the end repeat the last row, so the inner loop needs no mask. The stores mask them.
    rows, columns = tl.minimum(row, N - 1), tl.minimum(column, K - 1)
    products, squares, _ = row_products(queries, queue, rows, columns, D, D, 1, D, 1, DEPTH, NORMS, False, WIDEN)
    return row, column, products, squares


@triton.jit
def queue_contrastive_loss_forward_kernel(
    queries,
    queue,
    maxima,  # [tiles of the queue, N] fp32
    sums,  # [tiles of the queue, N] fp32: sum of exp(logit - maximum)
    inverse_queries,  # [N] fp32: 1 / norm
    inverse_temperature,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row, column, products, squares = negative_products(
        queries, queue, N, K, D, ROWS, COLUMNS, DEPTH, NORMS=True, WIDEN=WIDEN
    )
    inverse = inverse_norm(squares)
    logits = products * inverse[:, None] * inverse_temperature
    logits = tl.where((column < K)[None, :], logits, float("-inf"))
    top = tl.max(logits, 1)
    total = tl.sum(tl.exp(logits - top[:, None]), 1)
    part = tl.program_id(1).to(tl.int64) * N + row
    tl.store(maxima + part, top, mask=row < N)
    tl.store(sums + part, total, mask=row < N)
    tl.store(inverse_queries + row, inverse, mask=(row < N) & (tl.program_id(1) == 0))


@triton.jit
def queue_contrastive_loss_merge_kernel(
    queries,
    keys,
    maxima,
    sums,
    inverse_queries,
    inverse_keys,  # [N] fp32, like the outputs below
    misses,  # 1 - softmax of the positive
    tops,  # greatest logit
    log_sums,  # log of the sum of exp(logit - top)
    losses,
    inverse_temperature,
    N: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,  # tiles of the queue
    BLOCK: tl.constexpr,  # the next powers of two from D and from TILES
    PARTS: tl.constexpr,
):
    n = tl.program_id(0)
    column, part = tl.arange(0, BLOCK), tl.arange(0, PARTS)
    place = n.to(tl.int64) * D + column
    query = tl.load(queries + place, mask=column < D, other=0.0).to(tl.float32)
    key = tl.load(keys + place, mask=column < D, other=0.0).to(tl.float32)
    inverse_key = inverse_norm(tl.sum(key * key, 0))
    positive = tl.sum(query * key, 0) * tl.load(inverse_queries + n) * inverse_key * inverse_temperature
    part_place = part.to(tl.int64) * N + n
    part_maxima = tl.load(maxima + part_place, mask=part < TILES, other=float("-inf"))
    part_sums = tl.load(sums + part_place, mask=part < TILES, other=0.0)
    top = tl.maximum(tl.max(part_maxima, 0), positive)
    negatives = tl.sum(part_sums * tl.exp(part_maxima - top), 0)
    total = negatives + tl.exp(positive - top)
    log_sum = tl.log(total)
    tl.store(inverse_keys + n, inverse_key)
    tl.store(misses + n, negatives / total)  # not computed as 1 - softmax, which cancels for a confident row
    tl.store(tops + n, top)
    tl.store(log_sums + n, log_sum)
    tl.store(losses + n, log_sum - (positive - top))


@triton.jit
def queue_contrastive_loss_coefficient_kernel(
    queries,
    queue,
    tops,
    log_sums,
    inverse_queries,
    coefficients,  # [N, K] fp32: softmax
    inverse_temperature,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row, column, products, _ = negative_products(
        queries, queue, N, K, D, ROWS, COLUMNS, DEPTH, NORMS=False, WIDEN=WIDEN
    )
    inside = row < N
    inverse = tl.load(inverse_queries + row, mask=inside, other=0.0)
    top = tl.load(tops + row, mask=inside, other=0.0)
    log_sum = tl.load(log_sums + row, mask=inside, other=0.0)
    logits = products * inverse[:, None] * inverse_temperature
    coefficient = tl.exp((logits - top[:, None]) - log_sum[:, None])
    place = row.to(tl.int64)[:, None] * K + column[None, :]
    tl.store(coefficients + place, coefficient, mask=inside[:, None] & (column < K)[None, :])


@triton.jit
def queue_contrastive_loss_sum_kernel(
    coefficients,
    queue,
    sums,  # [N, D] fp32
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    FIRST: tl.constexpr,  # the first slice: the sums are still uninitialized
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside, within = row < N, column < D
    total = weighted_rows(
        coefficients,
        queue,
        None,
        row,
        inside,
        column,
        within,
        K,
        K,
        1,
        D,
        DEPTH,
        MIRRORED=False,
        WIDEN=WIDEN,
    )
    place, mask = row.to(tl.int64)[:, None] * D + column[None, :], inside[:, None] & within[None, :]
    if not FIRST:  # slices run in launch order, so the order of the sum is fixed
        total += tl.load(sums + place, mask=mask, other=0.0)
    tl.store(sums + place, total, mask=mask)


@triton.jit
def queue_contrastive_loss_gradient_kernel(
    queries,
    keys,
    sums,
    misses,
    inverse_queries,
    inverse_keys,
    upstream,  # [N] fp32
    gradients,
    inverse_temperature,
    D: tl.constexpr,
    OF_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,  # the next power of two from D
):
    # One program holds a whole row: the radial part is one sum over it, and the row is read once.
    n, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside, place = column < D, n.to(tl.int64) * D + column
    inverse, inverse_key = tl.load(inverse_queries + n), tl.load(inverse_keys + n)
    unit = tl.load(queries + place, mask=inside, other=0.0).to(tl.float32) * inverse
    unit_key = tl.load(keys + place, mask=inside, other=0.0).to(tl.float32) * inverse_key
    coefficient = -tl.load(misses + n)
    if OF_KEYS:
        total = coefficient * unit
        unit, inverse = unit_key, inverse_key
    else:
        total = tl.load(sums + place, mask=inside, other=0.0) + coefficient * unit_key
    # A row divided by the floor, not by its norm, has no radial part.
    radial = tl.where(inverse > CLAMPED, 0.0, tl.sum(total * unit, 0))
    scale = tl.load(upstream + n) * inverse_temperature
    tl.store(gradients + place, (total - unit * radial) * (inverse * scale), mask=inside)


def logit_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int, int]:
    """Returns (flops, unique bytes, issued bytes) of the products of queries and rows of the queue."""
    queries, queue = a["queries"], a["queue"]
    row_tiles, tiles = grid
    read = row_tiles * tiles * a["D"] * (a["ROWS"] * queries.itemsize + a["COLUMNS"] * queue.itemsize)
    return 2 * a["N"] * a["K"] * a["D"], total_bytes([queries, queue]), read


def forward_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    flops, unique, issued = logit_traffic(grid, a)
    written = 4 * a["N"] * (2 * grid[1] + 1)
    return Traffic(flops, unique + written, issued + written)


def merge_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    moved = total_bytes([a["queries"], a["keys"]]) + 4 * a["N"] * (2 * a["TILES"] + 1 + 5)
    return Traffic(0, moved, moved)


def coefficient_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    flops, unique, issued = logit_traffic(grid, a)
    n, written = a["N"], 4 * a["N"] * a["K"]
    return Traffic(flops, unique + 4 * 3 * n + written, issued + grid[1] * 4 * 3 * n + written)


def sum_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    n, k, d, queue = a["N"], a["K"], a["D"], a["queue"]
    column_blocks, row_blocks = grid
    halves, added = 1 if queue.itemsize == 4 else 2, 4 * n * d * (1 if a["FIRST"] else 2)
    queue_bytes = k * d * queue.itemsize
    return Traffic(
        2 * halves * n * k * d,
        4 * n * k + queue_bytes + added,
        column_blocks * 4 * n * k + row_blocks * queue_bytes + added,
    )


def gradient_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    sums = [] if a["OF_KEYS"] else [a["sums"]]
    moved = total_bytes([a["queries"], a["keys"], a["gradients"], *sums]) + 4 * 4 * grid[0]
    return Traffic(0, moved, moved)


class QueueForward(NamedTuple):
    """Results of the forward, each [N] fp32: the losses, and the tensors that backward needs."""

    losses: Tensor
    tops: Tensor
    log_sums: Tensor
    misses: Tensor
    inverse_queries: Tensor
    inverse_keys: Tensor


def empty_queue_forward(queries: Tensor) -> QueueForward:
    return QueueForward(*(queries.new_empty(len(queries), dtype=torch.float32) for _ in QueueForward._fields))


def queue_tiles(queries: Tensor, queue: Tensor, arch: int) -> tuple[Tile, Tile]:
    """Returns the configurations (of the logits, of the sums). Two different dtypes are multiplied in fp32."""
    dtype, width = queue.dtype if queries.dtype == queue.dtype else torch.float32, queue.shape[1]
    return tile("contrastive", dtype, width, arch), tile("queue_sum", queue.dtype, width, arch)


def queue_forward_launches(
    queries: Tensor, keys: Tensor, queue: Tensor, temperature: float, results: QueueForward, t: Tile
) -> list[Launch]:
    """The two launches of the forward. Tensors must be dense, queries and keys of one dtype."""
    (n, d), size = queries.shape, len(queue)
    tiles = blocks(size, t.columns)
    maxima, sums = (torch.empty((tiles, n), dtype=torch.float32, device=queue.device) for _ in "ms")
    shared = dict(
        queries=queries,
        maxima=maxima,
        sums=sums,
        inverse_queries=results.inverse_queries,
        inverse_temperature=1 / temperature,
        N=n,
        D=d,
    )
    forward = dict(queue=queue, K=size, **logit_constants(queries, queue, t), **shared)
    merge = dict(
        keys=keys,
        inverse_keys=results.inverse_keys,
        misses=results.misses,
        tops=results.tops,
        log_sums=results.log_sums,
        losses=results.losses,
        TILES=tiles,
        BLOCK=triton.next_power_of_2(d),
        PARTS=triton.next_power_of_2(tiles),
        **shared,
    )
    return [
        Launch(
            queue_contrastive_loss_forward_kernel,
            forward_traffic,
            (blocks(n, t.rows), tiles),
            forward,
            t.warps,
            t.stages,
        ),
        Launch(queue_contrastive_loss_merge_kernel, merge_traffic, (n,), merge),
    ]


def logit_constants(queries: Tensor, queue: Tensor, t: Tile) -> dict[str, Any]:
    """Returns the constants of the kernels that multiply queries and rows of the queue."""
    widen = queries.dtype != queue.dtype or (INTERPRETED and queue.dtype == torch.bfloat16)
    return dict(ROWS=t.rows, COLUMNS=t.columns, DEPTH=t.depth, WIDEN=widen)


def queue_backward_launches(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    temperature: float,
    results: QueueForward,
    upstream: Tensor,
    query_gradients: Tensor | None,
    key_gradients: Tensor | None,
    t: Tile,
    sum_tile: Tile,
) -> list[Launch]:
    """The launches of the backward: two per slice of the queue, and one per gradient of queries and keys.

    The gradient of the keys needs no slices.

    Args:
        queries, keys, queue, temperature: arguments of the forward.
        results: results of the forward.
        upstream: [N] fp32, the gradient of the losses.
        query_gradients, key_gradients: outputs, shaped like queries and keys; None to skip a side.
        t: tile of the logits.
        sum_tile: tile of the sums: queries by columns of D, summed over rows of the queue.
    """
    (n, d), launches = queries.shape, list[Launch]()
    shared = dict(queries=queries, inverse_queries=results.inverse_queries, inverse_temperature=1 / temperature, D=d)
    sums = torch.empty((n, d), dtype=torch.float32, device=queue.device)
    if query_gradients is not None:
        slices = queue.split(max(t.columns, COEFFICIENTS // n // t.columns * t.columns))
        memory = torch.empty(n * len(slices[0]), dtype=torch.float32, device=queue.device)
        for i, part in enumerate(slices):
            size = len(part)
            sliced = dict(queue=part, coefficients=memory[: n * size].view(n, size), N=n, K=size)
            logits = dict(tops=results.tops, log_sums=results.log_sums, **logit_constants(queries, queue, t))
            coefficient = dict(**logits, **sliced, **shared)
            grid = (blocks(n, t.rows), blocks(size, t.columns))
            launches.append(
                Launch(
                    queue_contrastive_loss_coefficient_kernel, coefficient_traffic, grid, coefficient, t.warps, t.stages
                )
            )
            add = dict(
                sums=sums,
                D=d,
                FIRST=i == 0,
                ROWS=sum_tile.rows,
                COLUMNS=sum_tile.columns,
                DEPTH=sum_tile.depth,
                WIDEN=INTERPRETED and queue.dtype == torch.bfloat16,
                **sliced,
            )
            grid = (blocks(d, sum_tile.columns), blocks(n, sum_tile.rows))
            launches.append(
                Launch(queue_contrastive_loss_sum_kernel, sum_traffic, grid, add, sum_tile.warps, sum_tile.stages)
            )
    for gradients in (query_gradients, key_gradients):
        if gradients is not None:
            gradient = dict(
                keys=keys,
                sums=sums,
                misses=results.misses,
                inverse_keys=results.inverse_keys,
                upstream=upstream,
                gradients=gradients,
                OF_KEYS=gradients is key_gradients,
                BLOCK=triton.next_power_of_2(d),
                **shared,
            )
            launches.append(Launch(queue_contrastive_loss_gradient_kernel, gradient_traffic, (n,), gradient))
    return launches


def launches(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float, *, arch: int) -> list[Launch]:
    """The launches of one call and of its backward pass, with the gradients of queries and keys."""
    t, sum_tile = queue_tiles(queries, queue, arch)
    results = empty_queue_forward(queries)
    shared = (queries, keys, queue, temperature, results)
    gradients = torch.empty_like(queries), torch.empty_like(keys)
    return [
        *queue_forward_launches(*shared, t),
        *queue_backward_launches(*shared, results.losses, *gradients, t, sum_tile),
    ]


def tunings(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Iterator[Tuning]:
    """The backward launches, whose sum tile can be measured. contrastive_losses measures the logits' tile."""
    shared = (queries, keys, queue, temperature, empty_queue_forward(queries))
    logits, _ = queue_tiles(queries, queue, architecture(queue))
    launch.run(queue_forward_launches(*shared, logits), queue.device)
    gradient = torch.empty_like(queries)
    given = (*shared, torch.ones_like(shared[4].losses), gradient, None, logits)
    yield Tuning("queue_sum", lambda t: queue_backward_launches(*given, t), [gradient])


def check_queue_dense(queries: Tensor, keys: Tensor, queue: Tensor) -> None:
    """Raises ValueError unless all rows are dense, as the kernels' addresses assume."""
    check_dense([queries], [keys])
    if not queue.is_contiguous():
        raise ValueError(
            f"queue has shape {tuple(queue.shape)} and strides {queue.stride()}; backend 'triton' takes a dense "
            "queue and makes no copy; store it contiguous"
        )


@torch.library.custom_op("mnclglf::queue_contrastive_loss", mutates_args=())
def queue_contrastive_loss(
    queries: Tensor, keys: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the fields of QueueForward for dense queries and keys [N, D] of one dtype and a queue [K, D]."""
    check_queue_dense(queries, keys, queue)
    results = empty_queue_forward(queries)
    t, _ = queue_tiles(queries, queue, architecture(queue))
    launch.run(queue_forward_launches(queries, keys, queue, temperature, results, t), queue.device)
    return tuple(results)  # pyright: ignore[reportReturnType]  # a tuple of six


@torch.library.custom_op("mnclglf::queue_contrastive_loss_backward", mutates_args=())
def queue_contrastive_loss_backward(
    upstream: Tensor,
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    tops: Tensor,
    log_sums: Tensor,
    misses: Tensor,
    inverse_queries: Tensor,
    inverse_keys: Tensor,
    temperature: float,
    of_queries: bool,
    of_keys: bool,
) -> list[Tensor]:
    """Returns the gradient of the queries, if asked for, then that of the keys, if asked for."""
    check_queue_dense(queries, keys, queue)
    results = QueueForward(upstream, tops, log_sums, misses, inverse_queries, inverse_keys)
    gradients = [torch.empty_like(rows) if asked else None for rows, asked in ((queries, of_queries), (keys, of_keys))]
    tiles = queue_tiles(queries, queue, architecture(queue))
    given = (queries, keys, queue, temperature, results, upstream)
    launch.run(queue_backward_launches(*given, *gradients, *tiles), queue.device)
    return [gradient for gradient in gradients if gradient is not None]


@queue_contrastive_loss.register_fake
def _(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, ...]:
    return tuple(empty_queue_forward(queries))


@queue_contrastive_loss_backward.register_fake
def _(upstream: Tensor, queries: Tensor, keys: Tensor, *rest: Any) -> list[Tensor]:
    *_, of_queries, of_keys = rest
    return [torch.empty_like(x) for x in [queries] * of_queries + [keys] * of_keys]


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, ...]) -> None:
    queries, keys, queue, ctx.temperature = inputs
    ctx.save_for_backward(queries, keys, queue, *output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
    asked = ctx.needs_input_grad[:2]
    given = (upstream.contiguous(), *ctx.saved_tensors, ctx.temperature)
    gradients = iter(queue_contrastive_loss_backward(*given, *asked))
    of_queries, of_keys = (next(gradients) if wanted else None for wanted in asked)
    return of_queries, of_keys, None, None


queue_contrastive_loss.register_autograd(_gradient, setup_context=_setup)
