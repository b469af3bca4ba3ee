"""The inner loops that the matmul kernels share: products of rows, their norms on the way, weighted sums of rows."""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(1e-12)  # torch.nn.functional.normalize's eps
CLAMPED = tl.constexpr(0.999999e12)  # an inverse norm above it comes from the floor
HALF_SCALE = tl.constexpr(4096.0)  # lifts fp16 weights, 4 at most, out of the subnormals


@triton.jit
def inverse_norm(squares):
    norm = tl.sqrt(squares)
    return 1.0 / tl.where(norm < FLOOR, FLOOR, norm)  # a NaN norm stays


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
    A_NORMS: tl.constexpr,
    B_NORMS: tl.constexpr,
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
        if A_NORMS:
            a_squares += tl.sum(a_tile.to(tl.float32) * a_tile.to(tl.float32), 1)
        if B_NORMS:
            b_squares += tl.sum(b_tile.to(tl.float32) * b_tile.to(tl.float32), 0)
        a_places += DEPTH * A_COLUMN
        b_places += DEPTH * B_COLUMN
    return products, a_squares, b_squares


@triton.jit
def weighted_rows(
    weights,  # fp32: of own row i and other row j at i * row_step + j * other_step
    others,  # dense rows, of width D
    inverses,  # what an other row is multiplied with, fp32; None: 1
    row,  # [R] own rows, and which of them are there
    inside,
    column,  # [C] columns of the other rows, and which of them are there
    within,
    count,  # other rows
    row_step,
    other_step,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    MIRRORED: tl.constexpr,  # the weight at j * row_step + i * other_step counts too
    WIDEN: tl.constexpr,
):
    """[R, C] sums over the other rows of weight times row, in fp32."""
    other = tl.arange(0, DEPTH)
    own_row = row.to(tl.int64)[:, None]
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for start in range(0, count, DEPTH):
        there = start + other < count
        other_row = (start + other).to(tl.int64)
        both = inside[:, None] & there[None, :]
        weight = tl.load(weights + own_row * row_step + other_row[None, :] * other_step, mask=both, other=0.0)
        if MIRRORED:
            weight += tl.load(weights + own_row * other_step + other_row[None, :] * row_step, mask=both, other=0.0)
        places = others + other_row[:, None] * D + column[None, :]
        values = tl.load(places, mask=there[:, None] & within[None, :], other=0.0)
        if inverses is None:
            inverse = tl.full([DEPTH], 1.0, tl.float32)
        else:
            inverse = tl.load(inverses + start + other, mask=there, other=0.0)
        if values.dtype == tl.float16:  # its range is too small: the values take the power of two, exactly
            power = (inverse.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            values = (values.to(tl.float32) * power[:, None]).to(tl.float16)
            inverse = tl.where(power > 0, inverse / power, inverse) * HALF_SCALE
        weight *= inverse[None, :]
        if WIDEN:
            total = tl.dot(weight, values.to(tl.float32), total, input_precision="ieee")
        elif values.dtype == tl.float32:
            total = tl.dot(weight, values, total, input_precision="ieee")
        else:  # rounded in two parts: what is radial in the total cancels later, and so would a rounding not
            high = weight.to(values.dtype)
            total = tl.dot(high, values, total)
            total = tl.dot((weight - high.to(tl.float32)).to(values.dtype), values, total)
    if others.dtype.element_ty == tl.float16:
        total /= HALF_SCALE
    return total
