"""nearest_neighbor in Triton: each program reduces one tile of scores to its row maxima; a second launch merges them.

The merge takes the tiles in a fixed order. M queries, K queue rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnclglf_kernels._triton import launch
from mnclglf_kernels._triton.launch import Launch, Traffic, architecture, blocks
from mnclglf_kernels._triton.products import row_products
from mnclglf_kernels._triton.tiles import FP32, LARGE, SMALL, Tile, Tuning, register, tile
from mnclglf_kernels.backend import INTERPRETED

# With D up to 128 a program has little to sum: smaller tiles make more programs, which keep all SMs busy. For larger D
# 128 x 128 tiles make 512 programs at the paper's sizes (M 512, K 16384).
register("neighbor", half=(SMALL, LARGE, LARGE), fp32=(FP32, FP32, FP32))
MERGED_QUERIES, MERGED_TILES = 16, 128  # per step of the merge


@triton.jit
def nearest_neighbor_search_kernel(
    queries,
    queue,
    scores,  # [tiles, M] fp32: greatest score of each tile
    rows,  # [tiles, M] int32: queue row of that score
    M: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    QUERY_COLUMN: tl.constexpr,
    QUEUE_STRIDE: tl.constexpr,
    QUEUE_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # Queries are on axis 0, the fastest: consecutive programs share a tile of the queue, so DRAM is read once.
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # Rows past the end repeat the last row, so the inner loop needs no mask. Their results are masked below.
    products, _, _ = row_products(
        queries,
        queue,
        tl.minimum(query, M - 1),
        tl.minimum(key, K - 1),
        D,
        QUERY_STRIDE,
        QUERY_COLUMN,
        QUEUE_STRIDE,
        QUEUE_COLUMN,
        DEPTH,
        A_NORMS=False,
        B_NORMS=False,
        WIDEN=WIDEN,
    )
    # Masked before the maximum: columns past K, and NaN, which is not equal to itself. The query is not normalized,
    # as its norm scales all its scores alike.
    products = tl.where((key < K)[None, :] & (products == products), products, float("-inf"))
    best, where = tl.max(products, 1, return_indices=True, return_indices_tie_break_left=True)
    # Ties take the leftmost column: the lowest row of the tile.
    place = tl.program_id(1).to(tl.int64) * M + query
    tl.store(scores + place, best, mask=query < M)
    tl.store(rows + place, tl.program_id(1) * COLUMNS + where, mask=query < M)


@triton.jit
def nearest_neighbor_merge_kernel(
    scores,
    rows,
    nearest,  # [M] int64
    M: tl.constexpr,
    TILES: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,  # tiles per step
):
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    best_row = tl.zeros([QUERIES], tl.int32)
    for first in range(0, TILES, BLOCK):
        tiles = first + tl.arange(0, BLOCK)
        inside = (tiles < TILES)[:, None] & (query < M)[None, :]
        place = tiles.to(tl.int64)[:, None] * M + query[None, :]
        top, where = tl.max(
            tl.load(scores + place, mask=inside, other=float("-inf")),
            0,
            return_indices=True,
            return_indices_tie_break_left=True,
        )
        there = (query < M) & (first + where < TILES)
        row = tl.load(rows + (first + where).to(tl.int64) * M + query, mask=there, other=0)
        # Strictly greater: an earlier tile keeps a tie, and a query with only NaN scores keeps row 0.
        best_row = tl.where(top > best, row, best_row)
        best = tl.maximum(top, best)
    tl.store(nearest + query, best_row.to(tl.int64), mask=query < M)


def search_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    m, k, d = a["M"], a["K"], a["D"]
    query_tiles, tiles = grid
    query_bytes, queue_bytes = a["queries"].itemsize, a["queue"].itemsize
    found = tiles * m * (4 + 4)
    return Traffic(
        2 * m * k * d,
        d * (m * query_bytes + k * queue_bytes) + found,
        query_tiles * tiles * d * (a["ROWS"] * query_bytes + a["COLUMNS"] * queue_bytes) + found,
    )


def merge_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    m, steps = a["M"], blocks(a["TILES"], a["BLOCK"])
    moved = 4 * a["TILES"] * m + 4 * steps * m + 8 * m
    return Traffic(0, moved, moved)


def neighbor_tile(queries: Tensor, queue: Tensor, arch: int) -> Tile:
    """Returns the configuration of a lookup. Two different dtypes are multiplied in fp32."""
    dtype = queue.dtype if queries.dtype == queue.dtype else torch.float32
    return tile("neighbor", dtype, queue.shape[1], arch)


def neighbor_launches(queries: Tensor, queue: Tensor, nearest: Tensor, t: Tile) -> list[Launch]:
    """The two launches of one lookup."""
    (count, width), size = queries.shape, queue.shape[0]
    tiles = blocks(size, t.columns)
    scores = torch.empty((tiles, count), dtype=torch.float32, device=queue.device)
    rows = torch.empty((tiles, count), dtype=torch.int32, device=queue.device)
    search = dict(
        queries=queries,
        queue=queue,
        scores=scores,
        rows=rows,
        M=count,
        K=size,
        D=width,
        QUERY_STRIDE=queries.stride(0),
        QUERY_COLUMN=queries.stride(1),
        QUEUE_STRIDE=queue.stride(0),
        QUEUE_COLUMN=queue.stride(1),
        ROWS=t.rows,
        COLUMNS=t.columns,
        DEPTH=t.depth,
        WIDEN=queries.dtype != queue.dtype or (INTERPRETED and queue.dtype == torch.bfloat16),
    )
    merge = dict(
        scores=scores, rows=rows, nearest=nearest, M=count, TILES=tiles, QUERIES=MERGED_QUERIES, BLOCK=MERGED_TILES
    )
    return [
        Launch(
            nearest_neighbor_search_kernel, search_traffic, (blocks(count, t.rows), tiles), search, t.warps, t.stages
        ),
        Launch(nearest_neighbor_merge_kernel, merge_traffic, (blocks(count, MERGED_QUERIES),), merge),
    ]


def launches(queries: Tensor, queue: Tensor, *, arch: int) -> list[Launch]:
    """The launches of one call."""
    return neighbor_launches(queries, queue, empty_nearest(queries, queue), neighbor_tile(queries, queue, arch))


def tunings(queries: Tensor, queue: Tensor) -> Iterator[Tuning]:
    """The launches of a lookup, whose tile can be measured."""
    nearest = empty_nearest(queries, queue)
    yield Tuning("neighbor", lambda t: neighbor_launches(queries, queue, nearest, t), [nearest])


def empty_nearest(queries: Tensor, queue: Tensor) -> Tensor:
    return queries.new_empty((queries.shape[0],), dtype=torch.int64)


@torch.library.custom_op("mnclglf::nearest_neighbor", mutates_args=())
def nearest_neighbor(queries: Tensor, queue: Tensor) -> Tensor:
    """Returns the [M] nearest queue rows of [M, D] queries in a [K, D] queue."""
    nearest = empty_nearest(queries, queue)
    t = neighbor_tile(queries, queue, architecture(queue))
    launch.run(neighbor_launches(queries, queue, nearest, t), queue.device)
    return nearest


nearest_neighbor.register_fake(empty_nearest)
