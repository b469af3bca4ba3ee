"""contrastive_loss in Triton, for several pairs of targets and predictions at once.

    forward       one program per tile of logits, which reduces it to parts of the log-sum-exp; computes the norms too
    merge         adds the parts in a fixed order: log-sum-exp of every row, loss of every pair. The log-sum-exp stays
                  two numbers, the greatest logit and the log of the sum of exp(logit - greatest). Their sum would
                  round the second: at temperature 0.05 its last digit is 2e-6, all that is left of a confident row
    coefficients  recomputes the logits as softmax - onehot; with the cosines, the radial part of the gradients
    gradient      multiplies coefficients by the other side's unit rows and subtracts the radial part

P pairs; pair i has targets [S_i * N, D] and predictions [N, D]. R = sum of S_i * N rows over all pairs. Pointers come
as tuples, and a program selects the pair of its tile. FIRST_ROWS and FIRST_TILES are the first row and the first row
tile of each pair, with the total at the end. SHIFT is the distance from a row to its positive. It is 0 except in
nt_xent, where a pair's targets are its predictions and a row is no candidate of itself.

In a run over RANKS ranks the rows are those of the images of RANK: n = N / RANKS per split, so pair i has targets
[S_i * n, D]. In nt_xent they are n per view, out of all 2N of the pair's targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnclglf_kernels._triton import launch
from mnclglf_kernels._triton.launch import Launch, Traffic, architecture, blocks, total_bytes
from mnclglf_kernels._triton.products import CLAMPED, inverse_norm, row_products, weighted_rows
from mnclglf_kernels._triton.tiles import DEEP, FP32, FP32_GRADIENT, SMALL, WIDE, Tile, Tuning, register, tile
from mnclglf_kernels.backend import INTERPRETED

register("contrastive", half=(SMALL, WIDE, DEEP), fp32=(FP32, FP32, FP32))
# A gradient is [N, D] or [S * N, D]. With D up to 512 larger tiles would leave SMs idle.
register("gradient", half=(SMALL, SMALL, WIDE), fp32=(FP32_GRADIENT, FP32_GRADIENT, FP32_GRADIENT))
MERGED = 1024  # rows per step of the merge


@triton.jit
def own_columns(row, N: tl.constexpr, SHIFT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Returns the columns of rows numbered within their pair, which their positives follow by SHIFT, modulo N."""
    own = row
    if RANKS > 1:
        local: tl.constexpr = (SHIFT if SHIFT > 0 else N) // RANKS  # rows per split, or per view
        own = row + row // local * (SHIFT - local) + RANK * local  # one division: with two sm_80 would spill
    return own


@triton.jit
def tile_products(
    targets,
    predictions,
    N: tl.constexpr,
    D: tl.constexpr,
    SHIFT: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    FIRST_ROWS: tl.constexpr,
    FIRST_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    NORMS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Returns the products of [ROWS] targets and [COLUMNS] predictions of the program's pair, with their indices.

    The result is (pair, true in the pair's first row tile, rows within the pair, mask of the rows that exist, row
    numbers among all pairs, columns, products, squared norms of the targets, squared norms of the predictions).
    """
    tile = tl.program_id(1)
    pair, first_tile, first_row, last_row = 0, 0, 0, FIRST_ROWS[1]
    h, p = targets[0], predictions[0]
    for i in tl.static_range(1, len(targets)):
        if tile >= FIRST_TILES[i]:
            pair, first_tile, first_row, last_row = i, FIRST_TILES[i], FIRST_ROWS[i], FIRST_ROWS[i + 1]
            h, p = targets[i], predictions[i]
    count = last_row - first_row
    row = (tile - first_tile) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # Rows past the end repeat the last row, so the inner loop needs no mask. The stores mask them.
    target = tl.minimum(row, count - 1)
    if SHIFT > 0:
        target = own_columns(target, N, SHIFT, RANK, RANKS)
    products, row_squares, column_squares = row_products(
        h, p, target, tl.minimum(column, N - 1), D, D, 1, D, 1, DEPTH, NORMS, NORMS, WIDEN
    )
    leads = tile == first_tile
    return pair, leads, row, row < count, first_row + row, column, products, row_squares, column_squares


@triton.jit
def contrastive_losses_forward_kernel(
    targets,
    predictions,
    maxima,  # [candidate tiles, R] fp32
    sums,  # [candidate tiles, R] fp32: sum of exp(logit - maximum)
    positives,  # [R] fp32: logit of the positive
    inverse_targets,  # [R] fp32: 1 / norm
    inverse_predictions,  # [P, N] fp32
    inverse_temperature,
    N: tl.constexpr,
    D: tl.constexpr,
    SHIFT: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    FIRST_ROWS: tl.constexpr,
    FIRST_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    pair, leads, row, inside, place, column, products, row_squares, column_squares = tile_products(
        targets,
        predictions,
        N,
        D,
        SHIFT,
        RANK,
        RANKS,
        FIRST_ROWS,
        FIRST_TILES,
        ROWS,
        COLUMNS,
        DEPTH,
        NORMS=True,
        WIDEN=WIDEN,
    )
    row_inverse, column_inverse = inverse_norm(row_squares), inverse_norm(column_squares)
    logits = products * row_inverse[:, None] * column_inverse[None, :] * inverse_temperature
    own = own_columns(row, N, SHIFT, RANK, RANKS)
    candidate = (column < N)[None, :]
    if SHIFT:
        candidate = candidate & (column[None, :] != own[:, None])
    # Masked before the maximum: columns past the end weigh exp(-inf) = 0. No top is -inf, since each tile has a real
    # column, and with SHIFT two of them, as 2N and the tile sides are even.
    logits = tl.where(candidate, logits, float("-inf"))
    top = tl.max(logits, 1)
    total = tl.sum(tl.exp(logits - top[:, None]), 1)
    label = (own + SHIFT) % N
    positive = tl.sum(tl.where(column[None, :] == label[:, None], logits, 0.0), 1)

    part = tl.program_id(0).to(tl.int64) * FIRST_ROWS[len(targets)] + place
    tl.store(maxima + part, top, mask=inside)
    tl.store(sums + part, total, mask=inside)
    # One program owns each of these: the tile of the label, the first candidate tile, the first row tile.
    tl.store(positives + place, positive, mask=inside & (label // COLUMNS == tl.program_id(0)))
    tl.store(inverse_targets + place, row_inverse, mask=inside & (tl.program_id(0) == 0))
    tl.store(inverse_predictions + pair * N + column, column_inverse, mask=(column < N) & leads)


@triton.jit
def contrastive_losses_merge_kernel(
    maxima,
    sums,
    positives,
    tops,  # [R] fp32: greatest logit
    log_sums,  # [R] fp32: log of the sum of exp(logit - top)
    losses,  # [P] fp32
    PAIRS: tl.constexpr,
    FIRST_ROWS: tl.constexpr,
    TILES: tl.constexpr,  # candidate tiles
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    first_row, last_row = 0, FIRST_ROWS[1]
    for i in tl.static_range(1, PAIRS):
        if pair == i:
            first_row, last_row = FIRST_ROWS[i], FIRST_ROWS[i + 1]
    loss = tl.zeros([BLOCK], tl.float32)
    for start in range(first_row, last_row, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < last_row
        part_maxima, part_sums = maxima + row, sums + row
        top = tl.load(part_maxima, mask=inside, other=0.0)
        total = tl.load(part_sums, mask=inside, other=1.0)  # log(1) = 0 for rows past the end
        for _ in range(1, TILES):
            part_maxima += FIRST_ROWS[PAIRS]
            part_sums += FIRST_ROWS[PAIRS]
            other = tl.load(part_maxima, mask=inside, other=0.0)
            greater = tl.maximum(top, other)
            total = total * tl.exp(top - greater)
            total += tl.load(part_sums, mask=inside, other=0.0) * tl.exp(other - greater)
            top = greater
        log_sum = tl.log(total)
        tl.store(tops + row, top, mask=inside)
        tl.store(log_sums + row, log_sum, mask=inside)
        loss += tl.where(inside, log_sum - (tl.load(positives + row, mask=inside, other=0.0) - top), 0.0)
    tl.store(losses + pair, tl.sum(loss, 0) / (last_row - first_row))


@triton.jit
def contrastive_losses_coefficient_kernel(
    targets,
    predictions,
    tops,
    log_sums,
    inverse_targets,
    inverse_predictions,
    coefficients,  # [R, N] fp32: softmax - onehot
    target_dots,  # [candidate tiles, R] fp32: sum of coefficient * cosine over a tile's columns
    prediction_dots,  # [row tiles, N] fp32: the same over a tile's rows
    inverse_temperature,
    N: tl.constexpr,
    D: tl.constexpr,
    SHIFT: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    FIRST_ROWS: tl.constexpr,
    FIRST_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    pair, _, row, inside, place, column, products, _, _ = tile_products(
        targets,
        predictions,
        N,
        D,
        SHIFT,
        RANK,
        RANKS,
        FIRST_ROWS,
        FIRST_TILES,
        ROWS,
        COLUMNS,
        DEPTH,
        NORMS=False,
        WIDEN=WIDEN,
    )
    row_inverse = tl.load(inverse_targets + place, mask=inside, other=0.0)
    column_inverse = tl.load(inverse_predictions + pair * N + column, mask=column < N, other=0.0)
    top = tl.load(tops + place, mask=inside, other=0.0)
    log_sum = tl.load(log_sums + place, mask=inside, other=0.0)
    own = own_columns(row, N, SHIFT, RANK, RANKS)
    cosines = products * row_inverse[:, None] * column_inverse[None, :]
    # The same factors in the same order as in the forward, so that the greatest logit minus its top is 0 (or the
    # rounding that a fused multiply-add leaves). softmax - onehot is formed in fp32: at logits of 10 the difference
    # is 4e-5, which is 0 if the softmax is rounded to bf16 first.
    coefficient = tl.exp((cosines * inverse_temperature - top[:, None]) - log_sum[:, None])
    coefficient -= tl.where(column[None, :] == ((own + SHIFT) % N)[:, None], 1.0, 0.0)
    valid = inside[:, None] & (column < N)[None, :]
    candidate = valid
    if SHIFT:
        candidate = candidate & (column[None, :] != own[:, None])
        coefficient = tl.where(candidate, coefficient, 0.0)
    radial = tl.where(candidate, coefficient * cosines, 0.0)  # masked: a row's product with itself may be infinite
    matrix_place = place.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(coefficients + matrix_place, coefficient, mask=valid)
    part = tl.program_id(0).to(tl.int64) * FIRST_ROWS[len(targets)] + place
    tl.store(target_dots + part, tl.sum(radial, 1), mask=inside)
    tl.store(prediction_dots + tl.program_id(1).to(tl.int64) * N + column, tl.sum(radial, 0), mask=column < N)


@triton.jit
def contrastive_losses_gradient_kernel(
    coefficients,
    rows,  # rows of this side (whose gradient is computed), and of the other side
    others,
    gradients,
    row_inverses,
    other_inverses,
    dots,  # [parts, R or N] fp32: radial parts of this side, and of the other side
    other_dots,
    upstream,  # [P] fp32
    inverse_temperature,
    N: tl.constexpr,
    D: tl.constexpr,
    SHIFT: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    FIRST_ROWS: tl.constexpr,
    FIRST_TILES: tl.constexpr,
    FIRST_BLOCKS: tl.constexpr,  # first program of each pair on axis 1
    PARTS: tl.constexpr,  # candidate tiles
    OF_TARGETS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Computes the gradient of targets or of predictions (with SHIFT: of both).

    One program owns one [ROWS, COLUMNS] tile of it and sums over all rows of the other side: no atomics.
    """
    block = tl.program_id(1)
    pair, first_block, first_row, last_row, first_part, last_part = 0, 0, 0, FIRST_ROWS[1], 0, FIRST_TILES[1]
    x, y, gradient, weights = rows[0], others[0], gradients[0], coefficients
    for i in tl.static_range(1, len(rows)):
        if block >= FIRST_BLOCKS[i]:
            pair, first_block = i, FIRST_BLOCKS[i]
            first_row, last_row = FIRST_ROWS[i], FIRST_ROWS[i + 1]
            first_part, last_part = FIRST_TILES[i], FIRST_TILES[i + 1]
            x, y, gradient, weights = rows[i], others[i], gradients[i], coefficients + FIRST_ROWS[i] * N
    row = (block - first_block) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    pair_rows = last_row - first_row
    if OF_TARGETS:
        count, other_count, first, first_other = pair_rows, N, first_row, pair * N
        row_step, other_step, part_size = N, 1, FIRST_ROWS[len(rows)]
        first_part, last_part, part_place = 0, PARTS, first_row + row
    else:
        count, other_count, first, first_other = N, pair_rows, pair * N, first_row
        row_step, other_step, part_size, part_place = 1, N, N, row

    inside, within = row < count, column < D
    query, queries = row, inside  # nt_xent: numbers of the rows that are queries too, and their mask
    if SHIFT > 0 and RANKS > 1:
        # The queries of view 1 and of view 2 see the row as a candidate. The candidates see it as a query.
        local: tl.constexpr = SHIFT // RANKS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        query_weights, query_rows, query_inverses = weights, y + RANK * local * D, other_inverses
        for _ in range(2):
            total = weighted_rows(
                query_weights,
                query_rows,
                query_inverses,
                row,
                inside,
                column,
                within,
                local,
                1,
                N,
                D,
                DEPTH,
                MIRRORED=False,
                WIDEN=WIDEN,
                initial=total,
            )
            query_weights += local * N
            query_rows += SHIFT * D
            query_inverses += local
        query = row % SHIFT - RANK * local
        queries = inside & (query >= 0) & (query < local)
        query += row // SHIFT * local
        candidates = N * tl.max(queries.to(tl.int32), 0)  # none for a tile without a query
        total = weighted_rows(
            weights,
            y,
            row_inverses,
            query,
            queries,
            column,
            within,
            candidates,
            N,
            1,
            D,
            DEPTH,
            MIRRORED=False,
            WIDEN=WIDEN,
            initial=total,
        )
    else:
        total = weighted_rows(
            weights,
            y,
            other_inverses + first_other,
            row,
            inside,
            column,
            within,
            other_count,
            row_step,
            other_step,
            D,
            DEPTH,
            MIRRORED=SHIFT > 0,
            WIDEN=WIDEN,
        )
    radial = tl.zeros([ROWS], tl.float32)  # u . g, from the coefficients' launch: no second pass over D
    for part in range(first_part, last_part):
        radial += tl.load(dots + part * part_size + part_place, mask=inside, other=0.0)
    if SHIFT:
        for part in range(PARTS):
            radial += tl.load(other_dots + part * FIRST_ROWS[1] + query, mask=queries, other=0.0)
    inverse = tl.load(row_inverses + first + row, mask=inside, other=0.0)
    radial = tl.where(inverse > CLAMPED, 0.0, radial)  # a row divided by the floor, not by its norm, has no radial part
    tile_place = row.to(tl.int64)[:, None] * D + column[None, :]
    tile_inside = inside[:, None] & within[None, :]
    unit = tl.load(x + tile_place, mask=tile_inside, other=0.0).to(tl.float32) * inverse[:, None]
    scale = tl.load(upstream + pair) * inverse_temperature / pair_rows
    tl.store(gradient + tile_place, (total - unit * radial[:, None]) * (inverse * scale)[:, None], mask=tile_inside)


def logit_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int, int]:
    """Returns (flops, unique bytes, issued bytes) of the products of all pairs."""
    d, rows = a["D"], a["FIRST_ROWS"][-1]
    candidate_tiles, row_tiles = grid
    read = candidate_tiles * row_tiles * d * (a["ROWS"] + a["COLUMNS"]) * a["targets"][0].itemsize
    return 2 * rows * a["N"] * d, total_bytes([*a["targets"], *a["predictions"]]), read


def forward_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    flops, unique, issued = logit_traffic(grid, a)
    rows, candidate_tiles = a["FIRST_ROWS"][-1], grid[0]
    written = 4 * (2 * candidate_tiles * rows + 2 * rows + len(a["targets"]) * a["N"])
    return Traffic(flops, unique + written, issued + written)


def merge_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    rows = a["FIRST_ROWS"][-1]
    moved = 4 * (2 * a["TILES"] * rows + 3 * rows + a["PAIRS"])
    return Traffic(0, moved, moved)


def coefficient_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    flops, unique, issued = logit_traffic(grid, a)
    n, rows, pairs = a["N"], a["FIRST_ROWS"][-1], len(a["targets"])
    candidate_tiles, row_tiles = grid
    written = 4 * (rows * n + candidate_tiles * rows + row_tiles * n)
    return Traffic(
        flops,
        unique + 4 * (3 * rows + pairs * n) + written,
        issued + 4 * (3 * candidate_tiles * rows + row_tiles * n) + written,
    )


def query_blocks(a: dict[str, Any]) -> int:
    """Returns the number of row blocks of nt_xent's gradient that contain a query."""
    local = a["SHIFT"] // a["RANKS"]
    queries = (view * a["SHIFT"] + a["RANK"] * local + i for view in range(2) for i in range(local))
    return len({query // a["ROWS"] for query in queries})


def gradient_traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    n, d, first_rows, own_blocks = a["N"], a["D"], a["FIRST_ROWS"], a["FIRST_BLOCKS"]
    itemsize, column_blocks, halves = a["rows"][0].itemsize, grid[0], 1 if a["rows"][0].itemsize == 4 else 2
    flops = unique = issued = 0
    for i in range(len(a["rows"])):
        rows, programs = first_rows[i + 1] - first_rows[i], own_blocks[i + 1] - own_blocks[i]
        parts = a["PARTS"] if a["OF_TARGETS"] else a["FIRST_TILES"][i + 1] - a["FIRST_TILES"][i]
        own, others = (rows, n) if a["OF_TARGETS"] else (n, rows)
        dots = own * parts + (rows * a["PARTS"] if a["SHIFT"] else 0)  # with SHIFT those of the other side too
        separate = a["SHIFT"] > 0 and a["RANKS"] > 1  # a second product, in the blocks that contain a query
        summed = programs * others + (query_blocks(a) * n if separate else 0)
        flops += 2 * halves * rows * n * d * (2 if separate else 1)
        unique += 4 * (rows * n + others + own + dots + 1) + own * d * itemsize
        loads = 2 if a["SHIFT"] else 1  # per coefficient: once for its row, and once for its column
        issued += column_blocks * 4 * (loads * rows * n + summed + programs + own + dots)
        issued += summed * d * itemsize + 2 * own * d * itemsize
    return Traffic(flops, unique + total_bytes([*a["rows"], *a["others"]]), issued)


class Part(NamedTuple):
    """The rows whose loss a call computes, and the distance to their positives."""

    rank: int = 0
    ranks: int = 1  # n = N / ranks
    shift: int = 0  # SHIFT: N in nt_xent, where N is half of the candidates

    def constants(self) -> dict[str, int]:
        return dict(SHIFT=self.shift, RANK=self.rank, RANKS=self.ranks)


WHOLE = Part()


class Geometry(NamedTuple):
    """Sizes of the pairs, whose rows are numbered one pair after the other."""

    candidates: int  # N
    width: int  # D
    row_counts: tuple[int, ...]  # S_i * n

    @classmethod
    def of(cls, targets: Sequence[Tensor], predictions: Sequence[Tensor], part: Part) -> Geometry:
        candidates, width = predictions[0].shape
        return cls(candidates, width, tuple(len(h) // (part.ranks if part.shift else 1) for h in targets))

    def first_rows(self) -> tuple[int, ...]:
        return tuple(accumulate(self.row_counts, initial=0))

    def first_tiles(self, size: int) -> tuple[int, ...]:
        """Returns the first row tile of each pair and their total, for tiles of `size` rows."""
        return tuple(accumulate((blocks(count, size) for count in self.row_counts), initial=0))


class Forward(NamedTuple):
    """Results of the forward: the losses, and the tensors that backward needs."""

    losses: Tensor  # [P] fp32
    tops: Tensor  # [R] fp32
    log_sums: Tensor  # [R] fp32
    inverse_targets: Tensor  # [R] fp32
    inverse_predictions: Tensor  # [P, N] fp32


def empty_forward(targets: Sequence[Tensor], predictions: Sequence[Tensor], part: Part = WHOLE) -> Forward:
    geometry = Geometry.of(targets, predictions, part)
    rows = sum(geometry.row_counts)
    shapes = [(len(targets),), (rows,), (rows,), (rows,), (len(targets), geometry.candidates)]
    return Forward(*(torch.empty(shape, dtype=torch.float32, device=targets[0].device) for shape in shapes))


def forward_launches(
    targets: Sequence[Tensor],
    predictions: Sequence[Tensor],
    temperature: float,
    results: Forward,
    t: Tile,
    part: Part = WHOLE,
) -> list[Launch]:
    """The two launches of the forward. Tensors must be dense, and all rows of one dtype."""
    geometry = Geometry.of(targets, predictions, part)
    n, d, _ = geometry
    device, dtype = targets[0].device, targets[0].dtype
    first_rows, first_tiles = geometry.first_rows(), geometry.first_tiles(t.rows)
    candidate_tiles = blocks(n, t.columns)
    maxima, sums = (torch.empty((candidate_tiles, first_rows[-1]), dtype=torch.float32, device=device) for _ in "ms")
    reduced = dict(maxima=maxima, sums=sums, positives=torch.empty_like(results.log_sums))
    forward = dict(
        targets=tuple(targets),
        predictions=tuple(predictions),
        inverse_targets=results.inverse_targets,
        inverse_predictions=results.inverse_predictions,
        inverse_temperature=1 / temperature,
        N=n,
        D=d,
        **part.constants(),
        FIRST_ROWS=first_rows,
        FIRST_TILES=first_tiles,
        ROWS=t.rows,
        COLUMNS=t.columns,
        DEPTH=t.depth,
        WIDEN=INTERPRETED and dtype == torch.bfloat16,
        **reduced,
    )
    merge = dict(
        tops=results.tops,
        log_sums=results.log_sums,
        losses=results.losses,
        PAIRS=len(targets),
        FIRST_ROWS=first_rows,
        TILES=candidate_tiles,
        BLOCK=MERGED,
        **reduced,
    )
    return [
        Launch(
            contrastive_losses_forward_kernel,
            forward_traffic,
            (candidate_tiles, first_tiles[-1]),
            forward,
            t.warps,
            t.stages,
        ),
        Launch(contrastive_losses_merge_kernel, merge_traffic, (len(targets),), merge),
    ]


def backward_launches(
    targets: Sequence[Tensor],
    predictions: Sequence[Tensor],
    temperature: float,
    results: Forward,
    upstream: Tensor,
    target_gradients: Sequence[Tensor],
    prediction_gradients: Sequence[Tensor],
    t: Tile,
    gradient_tile: Tile,
    part: Part = WHOLE,
) -> list[Launch]:
    """The launches of the backward: one for the coefficients, then one for each side with gradients to write.

    Args:
        targets, predictions, temperature: arguments of the forward.
        results: results of the forward.
        upstream: [P] fp32, the gradient of the losses.
        target_gradients, prediction_gradients: outputs, shaped like targets and predictions; empty to skip a side.
        t: tile of the logits; must be the forward's.
        gradient_tile: tile of a gradient: rows of one side by columns of D, summed over rows of the other side.
        part: must be the forward's. With a shift the prediction gradients include those of the targets.
    """
    geometry = Geometry.of(targets, predictions, part)
    n, d, _ = geometry
    device, dtype = targets[0].device, targets[0].dtype
    first_rows, first_tiles = geometry.first_rows(), geometry.first_tiles(t.rows)
    candidate_tiles = blocks(n, t.columns)
    coefficients = torch.empty((first_rows[-1], n), dtype=torch.float32, device=device)
    target_dots = torch.empty((candidate_tiles, first_rows[-1]), dtype=torch.float32, device=device)
    prediction_dots = torch.empty((first_tiles[-1], n), dtype=torch.float32, device=device)
    shared = dict(
        coefficients=coefficients,
        inverse_temperature=1 / temperature,
        N=n,
        D=d,
        **part.constants(),
        FIRST_ROWS=first_rows,
        FIRST_TILES=first_tiles,
    )
    coefficient = dict(
        targets=tuple(targets),
        predictions=tuple(predictions),
        tops=results.tops,
        log_sums=results.log_sums,
        inverse_targets=results.inverse_targets,
        inverse_predictions=results.inverse_predictions,
        target_dots=target_dots,
        prediction_dots=prediction_dots,
        ROWS=t.rows,
        COLUMNS=t.columns,
        DEPTH=t.depth,
        WIDEN=INTERPRETED and dtype == torch.bfloat16,
        **shared,
    )
    launches = [
        Launch(
            contrastive_losses_coefficient_kernel,
            coefficient_traffic,
            (candidate_tiles, first_tiles[-1]),
            coefficient,
            t.warps,
            t.stages,
        )
    ]
    target_side = (targets, results.inverse_targets, target_dots)
    prediction_side = (predictions, results.inverse_predictions, prediction_dots)
    t, pairs = gradient_tile, len(targets)
    for own, other, gradients, first_blocks in (
        (target_side, prediction_side, target_gradients, geometry.first_tiles(t.rows)),
        (prediction_side, target_side, prediction_gradients, tuple(blocks(n, t.rows) * i for i in range(pairs + 1))),
    ):
        if not gradients:
            continue
        gradient = dict(
            rows=tuple(own[0]),
            others=tuple(other[0]),
            gradients=tuple(gradients),
            row_inverses=own[1],
            other_inverses=other[1],
            dots=own[2],
            other_dots=other[2],
            upstream=upstream,
            FIRST_BLOCKS=first_blocks,
            PARTS=candidate_tiles,
            OF_TARGETS=own is target_side,
            ROWS=t.rows,
            COLUMNS=t.columns,
            DEPTH=t.depth,
            WIDEN=INTERPRETED and dtype == torch.bfloat16,
            **shared,
        )
        launches.append(
            Launch(
                contrastive_losses_gradient_kernel,
                gradient_traffic,
                (blocks(d, t.columns), first_blocks[-1]),
                gradient,
                t.warps,
                t.stages,
            )
        )
    return launches


def contrastive_tiles(rows: Tensor, arch: int) -> tuple[Tile, Tile]:
    """Returns the configurations (of the logits, of the gradients) for rows of this width and dtype."""
    logits, gradients = (tile(name, rows.dtype, rows.shape[1], arch) for name in ("contrastive", "gradient"))
    return logits, gradients


def launches(
    pairs: Sequence[tuple[Tensor, Tensor]], temperature: float, *, rank: int = 0, ranks: int = 1, arch: int
) -> list[Launch]:
    """The launches of one call with pairs of one dtype and of its backward pass, with the gradients of both sides."""
    targets, predictions = ([pair[side] for pair in pairs] for side in (0, 1))
    t, gradient_tile = contrastive_tiles(targets[0], arch)
    results, part = empty_forward(targets, predictions), Part(rank, ranks)
    shared = (targets, predictions, temperature, results)
    return [
        *forward_launches(*shared, t, part),
        *backward_launches(*shared, results.losses, targets, predictions, t, gradient_tile, part),
    ]


def tunings(
    pairs: Sequence[tuple[Tensor, Tensor]], temperature: float, *, rank: int = 0, ranks: int = 1
) -> Iterator[Tuning]:
    """The launches whose tiles can be measured: forward, and gradient of the predictions, the one that a step needs."""
    targets, predictions = ([pair[side] for pair in pairs] for side in (0, 1))
    shared, part = (targets, predictions, temperature, empty_forward(targets, predictions)), Part(rank, ranks)
    yield Tuning("contrastive", lambda t: forward_launches(*shared, t, part), list(shared[3]))
    logits, _ = contrastive_tiles(targets[0], architecture(targets[0]))
    launch.run(forward_launches(*shared, logits, part), targets[0].device)
    gradients = [torch.empty_like(x) for x in predictions]
    given = (*shared, torch.ones_like(shared[3].losses), [], gradients, logits)
    yield Tuning("gradient", lambda t: backward_launches(*given, t, part), gradients)


def check_dense(targets: Sequence[Tensor], predictions: Sequence[Tensor]) -> None:
    """Raises ValueError unless all rows are dense and of one dtype, as the kernels' addresses assume."""
    for rows in (*targets, *predictions):
        if not rows.is_contiguous() or rows.dtype != targets[0].dtype:
            raise ValueError(
                f"rows of shape {tuple(rows.shape)}, strides {rows.stride()} and {rows.dtype}; this operator takes "
                "dense rows of one dtype; call mnclglf_kernels.contrastive_losses, which converts any rows"
            )


@torch.library.custom_op("mnclglf::contrastive_losses", mutates_args=())
def contrastive_losses(
    targets: list[Tensor], predictions: list[Tensor], temperature: float, rank: int = 0, ranks: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the fields of Forward for P pairs of dense targets [S_i * n, D] and predictions [N, D] of one dtype."""
    results = empty_forward(targets, predictions)
    check_dense(targets, predictions)
    t, _ = contrastive_tiles(targets[0], architecture(targets[0]))
    part = Part(rank, ranks)
    launch.run(forward_launches(targets, predictions, temperature, results, t, part), targets[0].device)
    return results.losses, results.tops, results.log_sums, results.inverse_targets, results.inverse_predictions


@torch.library.custom_op("mnclglf::contrastive_losses_backward", mutates_args=())
def contrastive_losses_backward(
    upstream: Tensor,
    targets: list[Tensor],
    predictions: list[Tensor],
    tops: Tensor,
    log_sums: Tensor,
    inverse_targets: Tensor,
    inverse_predictions: Tensor,
    temperature: float,
    of_targets: bool,
    of_predictions: bool,
    rank: int = 0,
    ranks: int = 1,
) -> list[Tensor]:
    """Returns the gradients of the targets, if asked for, then those of the predictions, if asked for."""
    check_dense(targets, predictions)
    results = Forward(upstream, tops, log_sums, inverse_targets, inverse_predictions)
    target_gradients, prediction_gradients = (
        [torch.empty_like(x) for x in side] if asked else []
        for side, asked in ((targets, of_targets), (predictions, of_predictions))
    )
    launches = backward_launches(
        targets,
        predictions,
        temperature,
        results,
        upstream,
        target_gradients,
        prediction_gradients,
        *contrastive_tiles(targets[0], architecture(targets[0])),
        Part(rank, ranks),
    )
    launch.run(launches, targets[0].device)
    return target_gradients + prediction_gradients


@contrastive_losses.register_fake
def _(targets: list[Tensor], predictions: list[Tensor], *_: Any) -> tuple[Tensor, ...]:
    return tuple(empty_forward(targets, predictions))


@contrastive_losses_backward.register_fake
def _(
    upstream: Tensor,
    targets: list[Tensor],
    predictions: list[Tensor],
    tops: Tensor,
    log_sums: Tensor,
    inverse_targets: Tensor,
    inverse_predictions: Tensor,
    temperature: float,
    of_targets: bool,
    of_predictions: bool,
    rank: int = 0,
    ranks: int = 1,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in targets * of_targets + predictions * of_predictions]


def _setup(ctx: Any, inputs: tuple[list[Tensor], list[Tensor], float, int, int], output: tuple[Tensor, ...]) -> None:
    targets, predictions, ctx.temperature, ctx.rank, ctx.ranks = inputs
    ctx.pairs = len(targets)
    ctx.save_for_backward(*targets, *predictions, *output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[list[Tensor | None] | None, ...]:
    pairs = ctx.pairs
    saved = ctx.saved_tensors
    targets, predictions = list(saved[:pairs]), list(saved[pairs : 2 * pairs])
    of_targets, of_predictions = (any(side) for side in ctx.needs_input_grad[:2])
    gradients: list[Tensor | None] = contrastive_losses_backward(
        upstream.contiguous(),
        targets,
        predictions,
        *saved[2 * pairs :],
        ctx.temperature,
        of_targets,
        of_predictions,
        ctx.rank,
        ctx.ranks,
    )
    none: list[Tensor | None] = [None] * pairs
    return (
        gradients[:pairs] if of_targets else none,
        gradients[-pairs:] if of_predictions else none,
        None,
        None,
        None,
    )


contrastive_losses.register_autograd(_gradient, setup_context=_setup)
