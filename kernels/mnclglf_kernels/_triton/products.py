"""Inner loops of the matmul kernels: products of rows (with the rows' squared norms) and weighted sums of rows."""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(1e-12)  # eps of torch.nn.functional.normalize
CLAMPED = tl.constexpr(0.999999e12)  # an inverse norm above this limit is 1 / FLOOR: the norm was clamped
# fp16 weights are at most 4 here. Times 4096 they leave the subnormal range and stay below fp16's 65504.
HALF_SCALE = tl.constexpr(4096.0)


@triton.jit
def inverse_norm(squares):
    norm = tl.sqrt(squares)
    return 1.0 / tl.where(norm < FLOOR, FLOOR, norm)  # tl.where, not tl.maximum: a NaN norm stays NaN


@triton.jit
def row_products(
    a,
    b,
    a_rows,  # [A] row numbers of a and [B] of b; all of them exist, so rows need no mask
    b_rows,
    D: tl.constexpr,
    A_STRIDE: tl.constexpr,  # row stride and column stride, in elements
    A_COLUMN: tl.constexpr,
    B_STRIDE: tl.constexpr,
    B_COLUMN: tl.constexpr,
    DEPTH: tl.constexpr,
    A_NORMS: tl.constexpr,
    B_NORMS: tl.constexpr,
    WIDEN: tl.constexpr,  # cast to fp32 first: for two different dtypes, and in the interpreter, whose bf16 is wrong
):
    """Returns ([A, B] products, [A] squared norms of a, [B] squared norms of b), summed in fp32.

    Squared norms that are not asked for are zeros.
    """
    # int64: row number times row stride passes 2^31 for a large queue.
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
            left = depth < D - start  # zeros past the last column add nothing to products or norms
            a_tile = tl.load(a_places, mask=left[None, :], other=0.0)
            b_tile = tl.load(b_places, mask=left[:, None], other=0.0)
        if WIDEN:
            a_tile, b_tile = a_tile.to(tl.float32), b_tile.to(tl.float32)
        # "ieee": by default fp32 operands are rounded to TF32. fp16 and bf16 are unaffected.
        products = tl.dot(a_tile, b_tile, products, input_precision="ieee")
        # The norms come from the tiles that the product has loaded anyway: no second pass over the rows.
        if A_NORMS:
            a_squares += tl.sum(a_tile.to(tl.float32) * a_tile.to(tl.float32), 1)
        if B_NORMS:
            b_squares += tl.sum(b_tile.to(tl.float32) * b_tile.to(tl.float32), 0)
        a_places += DEPTH * A_COLUMN
        b_places += DEPTH * B_COLUMN
    return products, a_squares, b_squares


@triton.jit
def weighted_rows(
    weights,  # fp32; the weight of own row i and other row j is at i * row_step + j * other_step
    others,  # dense rows of width D
    inverses,  # fp32 factor of each other row; None for 1
    row,  # [R] own row numbers, and the mask of those that exist
    inside,
    column,  # [C] columns of the other rows, and the mask of those that exist
    within,
    count,  # number of other rows
    row_step,
    other_step,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    MIRRORED: tl.constexpr,  # add the weight at j * row_step + i * other_step
    WIDEN: tl.constexpr,
    initial=None,  # [R, C] fp32 sums to which these are added; None for zeros
):
    """Returns the [R, C] sums over the other rows of weight times row, in fp32.

    Other rows are added in ascending order, DEPTH at a time, so a launch gives the same bits each time.
    """
    other = tl.arange(0, DEPTH)
    own_row = row.to(tl.int64)[:, None]
    if initial is None:
        total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    elif others.dtype.element_ty == tl.float16:
        total = initial * HALF_SCALE
    else:
        total = initial
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
        # fp16 has not the range for a weight times an inverse norm. The values take the power of two of the inverse
        # instead, which is exact.
        if values.dtype == tl.float16:
            power = (inverse.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            values = (values.to(tl.float32) * power[:, None]).to(tl.float16)
            inverse = tl.where(power > 0, inverse / power, inverse) * HALF_SCALE
        weight *= inverse[None, :]
        if WIDEN:
            total = tl.dot(weight, values.to(tl.float32), total, input_precision="ieee")
        elif values.dtype == tl.float32:
            total = tl.dot(weight, values, total, input_precision="ieee")
        else:
            # The weight is split into two half-precision numbers. The radial part of the total cancels later; rounded
            # once to bf16, a weight would leave 2^-9 of the whole there.
            high = weight.to(values.dtype)
            total = tl.dot(high, values, total)
            total = tl.dot((weight - high.to(tl.float32)).to(values.dtype), values, total)
    if others.dtype.element_ty == tl.float16:
        total /= HALF_SCALE
    return total
