"""What a launch computes and moves, in closed form: floating-point operations, unique and issued bytes.

Unique bytes are what any implementation has to move: each element that is read once, each that is written once. Issued
bytes are what the programs ask for, tiles read again and again included: on a GPU the difference is traffic of the L2
cache. tests/kernels/test_traffic.py holds both against counts of the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from mnclglf_kernels._triton.launch import Launch, blocks


class Traffic(NamedTuple):
    """Of one launch."""

    flops: int  # multiplications and additions of the matrix products; the rest is not counted
    unique_bytes: int
    issued_bytes: int


def traffic(launch: Launch) -> Traffic:
    """The traffic of a launch, from its arguments alone."""
    return FORMULAS[launch.kernel.__name__](launch.grid, launch.arguments)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Of tensors, each counted once."""
    return sum({id(x): x.numel() * x.itemsize for x in tensors}.values())


def augment(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    """Each view reads its whole image; a rotation reads a pixel up to four times, which is what is counted."""
    count, h, w, s = grid[0], a["HP"], a["WP"], a["SP"]
    image, written = 3 * a["H"] * a["W"], total_bytes([a["views"]])
    row = 8 + 4 * a["parameters"].shape[1] + 4 * 6  # which image, the numbers of the view, mean and std
    resize = 2 * 4 * s * (h * w + h * s)
    blur = 3 * 4 * s * s * s * 2 if a["WINDOW"] > 1 else 0
    return Traffic(
        2 * count * (resize + blur),
        len(a["rows"]) * (image + 8) + total_bytes([a["parameters"], a["mean"], a["std"]]) + written,
        count * (image * (4 if a["ROTATES"] else 1) + row) + written,
    )


def divide(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    moved = 2 * a["patches"].numel() * a["patches"].itemsize
    return Traffic(0, moved, moved)


def combine(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    moved = total_bytes([a["features"], a["combined"]])
    return Traffic(0, moved, moved)


def enqueue(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    rows, gate = a["rows"], a["keep"].itemsize if a["GATED"] else 0
    moved = rows.numel() * (rows.itemsize + a["queue"].itemsize)
    return Traffic(0, moved + 8 + gate, moved + len(rows) * (8 + gate))


def advance(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    moved = 16 + (a["keep"].itemsize if a["GATED"] else 0)
    return Traffic(0, moved, moved)


def neighbor(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    m, k, d = a["M"], a["K"], a["D"]
    query_tiles, tiles = grid
    query_bytes, queue_bytes = a["queries"].itemsize, a["queue"].itemsize
    found = tiles * m * (4 + 4)
    return Traffic(
        2 * m * k * d,
        d * (m * query_bytes + k * queue_bytes) + found,
        query_tiles * tiles * d * (a["ROWS"] * query_bytes + a["COLUMNS"] * queue_bytes) + found,
    )


def neighbor_merge(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    m, steps = a["M"], blocks(a["TILES"], a["BLOCK"])
    moved = 4 * a["TILES"] * m + 4 * steps * m + 8 * m
    return Traffic(0, moved, moved)


def logits(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int, int]:
    """(flops, unique bytes, issued bytes) of the products of all pairs."""
    d, rows = a["D"], a["FIRST_ROWS"][-1]
    candidate_tiles, row_tiles = grid
    read = candidate_tiles * row_tiles * d * (a["ROWS"] + a["COLUMNS"]) * a["targets"][0].itemsize
    return 2 * rows * a["N"] * d, total_bytes([*a["targets"], *a["predictions"]]), read


def forward(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    flops, unique, issued = logits(grid, a)
    rows, candidate_tiles = a["FIRST_ROWS"][-1], grid[0]
    written = 4 * (2 * candidate_tiles * rows + 2 * rows + len(a["targets"]) * a["N"])
    return Traffic(flops, unique + written, issued + written)


def merge(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    rows = a["FIRST_ROWS"][-1]
    moved = 4 * (2 * a["TILES"] * rows + 3 * rows + a["PAIRS"])
    return Traffic(0, moved, moved)


def coefficient(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    flops, unique, issued = logits(grid, a)
    n, rows, pairs = a["N"], a["FIRST_ROWS"][-1], len(a["targets"])
    candidate_tiles, row_tiles = grid
    written = 4 * (rows * n + candidate_tiles * rows + row_tiles * n)
    return Traffic(
        flops,
        unique + 4 * (3 * rows + pairs * n) + written,
        issued + 4 * (3 * candidate_tiles * rows + row_tiles * n) + written,
    )


def gradient(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    n, d, first_rows, own_blocks = a["N"], a["D"], a["FIRST_ROWS"], a["FIRST_BLOCKS"]
    itemsize, column_blocks, halves = a["rows"][0].itemsize, grid[0], 1 if a["rows"][0].itemsize == 4 else 2
    flops = unique = issued = 0
    for i in range(len(a["rows"])):
        rows, programs = first_rows[i + 1] - first_rows[i], own_blocks[i + 1] - own_blocks[i]
        parts = a["PARTS"] if a["OF_TARGETS"] else a["FIRST_TILES"][i + 1] - a["FIRST_TILES"][i]
        parts += a["PARTS"] if a["SHIFT"] else 0  # of the other side too
        own, others = (rows, n) if a["OF_TARGETS"] else (n, rows)
        flops += 2 * halves * rows * n * d
        unique += 4 * (rows * n + others + own * (parts + 1) + 1) + own * d * itemsize
        loads = 2 if a["SHIFT"] else 1  # of a coefficient: as that of a row and as that of a column
        issued += column_blocks * 4 * (loads * rows * n + programs * (others + 1) + own * (parts + 1))
        issued += programs * others * d * itemsize + 2 * own * d * itemsize
    return Traffic(flops, unique + total_bytes([*a["rows"], *a["others"]]), issued)


def negatives(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int, int]:
    """(flops, unique bytes, issued bytes) of the products of queries and rows of the queue."""
    queries, queue = a["queries"], a["queue"]
    row_tiles, tiles = grid
    read = row_tiles * tiles * a["D"] * (a["ROWS"] * queries.itemsize + a["COLUMNS"] * queue.itemsize)
    return 2 * a["N"] * a["K"] * a["D"], total_bytes([queries, queue]), read


def queue_forward(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    flops, unique, issued = negatives(grid, a)
    written = 4 * a["N"] * (2 * grid[1] + 1)
    return Traffic(flops, unique + written, issued + written)


def queue_merge(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    moved = total_bytes([a["queries"], a["keys"]]) + 4 * a["N"] * (2 * a["TILES"] + 1 + 5)
    return Traffic(0, moved, moved)


def queue_coefficient(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    flops, unique, issued = negatives(grid, a)
    n, written = a["N"], 4 * a["N"] * a["K"]
    return Traffic(flops, unique + 4 * 3 * n + written, issued + grid[1] * 4 * 3 * n + written)


def queue_sum(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    n, k, d, queue = a["N"], a["K"], a["D"], a["queue"]
    column_blocks, row_blocks = grid
    halves, added = 1 if queue.itemsize == 4 else 2, 4 * n * d * (1 if a["FIRST"] else 2)
    queue_bytes = k * d * queue.itemsize
    return Traffic(
        2 * halves * n * k * d,
        4 * n * k + queue_bytes + added,
        column_blocks * 4 * n * k + row_blocks * queue_bytes + added,
    )


def queue_gradient(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    sums = [] if a["OF_KEYS"] else [a["sums"]]
    moved = total_bytes([a["queries"], a["keys"], a["gradients"], *sums]) + 4 * 4 * grid[0]
    return Traffic(0, moved, moved)


FORMULAS = {
    "augment_kernel": augment,
    "divide_kernel": divide,
    "combine_kernel": combine,
    "enqueue_kernel": enqueue,
    "advance_kernel": advance,
    "neighbor_kernel": neighbor,
    "neighbor_merge_kernel": neighbor_merge,
    "forward_kernel": forward,
    "merge_kernel": merge,
    "coefficient_kernel": coefficient,
    "gradient_kernel": gradient,
    "queue_forward_kernel": queue_forward,
    "queue_merge_kernel": queue_merge,
    "queue_coefficient_kernel": queue_coefficient,
    "queue_sum_kernel": queue_sum,
    "queue_gradient_kernel": queue_gradient,
}
