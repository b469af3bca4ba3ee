"""The inner loop that the matmul kernels share: products of rows, and their norms on the way."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_products(
    a,
    b,
    a_rows,  # [A] rows of a and [B] of b, all of them there
    b_rows,
    D: tl.constexpr,
    A_STRIDE: tl.constexpr,  # from row to row, and from column to column
    A_COLUMN: tl.constexpr,
    B_STRIDE: tl.constexpr,
    B_COLUMN: tl.constexpr,
    DEPTH: tl.constexpr,
    NORMS: tl.constexpr,
    WIDEN: tl.constexpr,  # to fp32 before multiplying: for two dtypes, and in the interpreter, whose bf16 is wrong
):
    """([A, B] products of rows a and rows b, [A] and [B] squared norms or zeros), summed in fp32."""
    depth = tl.arange(0, DEPTH).to(tl.int64)
    a_places = a + a_rows.to(tl.int64)[:, None] * A_STRIDE + depth[None, :] * A_COLUMN
    b_places = b + b_rows.to(tl.int64)[None, :] * B_STRIDE + depth[:, None] * B_COLUMN
    products = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
    a_squares = tl.zeros([a_rows.shape[0]], tl.float32)
    b_squares = tl.zeros([b_rows.shape[0]], tl.float32)
    for start in range(0, D, DEPTH):
        if D % DEPTH == 0:
            a_tile, b_tile = tl.load(a_places), tl.load(b_places)
        else:
            left = depth < D - start
            a_tile = tl.load(a_places, mask=left[None, :], other=0.0)
            b_tile = tl.load(b_places, mask=left[:, None], other=0.0)
        if WIDEN:
            a_tile, b_tile = a_tile.to(tl.float32), b_tile.to(tl.float32)
        products = tl.dot(a_tile, b_tile, products, input_precision="ieee")
        if NORMS:
            a_squares += tl.sum(a_tile.to(tl.float32) * a_tile.to(tl.float32), 1)
            b_squares += tl.sum(b_tile.to(tl.float32) * b_tile.to(tl.float32), 0)
        a_places += DEPTH * A_COLUMN
        b_places += DEPTH * B_COLUMN
    return products, a_squares, b_squares
