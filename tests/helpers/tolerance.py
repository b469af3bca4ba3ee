"""Tolerances: a result may exceed the error of plain PyTorch in the same dtype only by rounding."""

import math

import oracles
import torch
from torch import Tensor
from torch.nn import functional as F

ULPS_FP32 = 8  # sums in another order, exp and log differ by a few units in the last place


def working_epsilon(dtype: torch.dtype) -> float:
    """Returns the spacing at 1.0 of an operator's accumulation dtype: fp64 for fp64 input, else fp32."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def row_maxima(x: Tensor) -> Tensor:
    """Returns the maximum per row: [M, ...] -> [M], a scalar -> [1]. So a row of 1e12 hides no error of a row of 1."""
    return x.double().abs().reshape(len(x) if x.dim() else 1, -1).amax(dim=1)


def assert_as_accurate_as_plain(
    actual: Tensor, plain: Tensor, truth: Tensor, floor: float | Tensor, *, what: str
) -> None:
    """Asserts that the error of `actual` against fp64 `truth` is at most 2 x the error of `plain` + floor, row by row.

    `floor` is a scalar or [M].
    """
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert torch.isfinite(actual).all(), f"{what} is not finite"
    error = row_maxima(actual.double() - truth)
    allowed = 2 * row_maxima(plain.double() - truth) + floor
    allowed = torch.where(torch.isnan(allowed), torch.inf, allowed)  # plain PyTorch is NaN: accept any value
    worst = int((error - allowed).argmax())
    assert (error <= allowed).all(), f"{what}: row {worst} is off by {error[worst]:.3e}, allowed {allowed[worst]:.3e}"


def loss_floor(temperature: float, candidates: int, dtype: torch.dtype) -> float:
    """Returns the rounding error of the contrastive loss, relative to logits of up to 1/tau."""
    return ULPS_FP32 * working_epsilon(dtype) * (1 + 1 / temperature + math.log(candidates))


def gradient_floor(rows: Tensor, terms: int, temperature: float, upstream: float, truth: Tensor) -> Tensor:
    """Returns the rounding error [M] of the contrastive loss's gradient for `rows` [M, D].

    A logit of up to 1/tau carries an error of eps/tau into exp. The sum over the candidates carries the log of their
    number, as in `loss_floor`, here bounded by the number of terms. The gradient of a row is a sum of coefficients of
    up to upstream / (terms * tau * norm), and the store rounds once to the dtype of the rows.
    """
    norms = rows.double().norm(dim=1).clamp(min=oracles.NORM_FLOOR)
    scale = abs(upstream) / (terms * temperature * norms)
    rounding = ULPS_FP32 * working_epsilon(rows.dtype) * (1 + 1 / temperature + math.log(terms)) * scale
    if rows.dtype == torch.float64:
        rounding = 2 * rounding  # the truth is computed in fp64 too, so it rounds as much as the result
    stored = torch.finfo(rows.dtype).eps * truth.abs().amax(dim=1) + torch.finfo(rows.dtype).tiny
    return rounding + stored


def combine_floor(features: Tensor, truth: Tensor) -> Tensor:
    """Returns the rounding error [S*N] of one store in the dtype of the features and of an fp32 sum of four terms."""
    stored = torch.finfo(features.dtype).eps / 2 * truth.abs().amax(dim=1) + torch.finfo(features.dtype).tiny
    return stored + ULPS_FP32 * working_epsilon(features.dtype) * features.double().abs().max()


def unit_scores(queries: Tensor, queue: Tensor) -> Tensor:
    """Returns products of normalized queries [M, D] and rows [K, D], as [M, K] in fp64."""
    queries = queries.double()
    queries = queries / queries.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return F.normalize(queries, dim=1) @ queue.double().t()


def assert_nearest(index: Tensor, queries: Tensor, queue: Tensor, epsilon: float | None = None) -> None:
    """Asserts that no row of the queue is more similar than the one at the index, up to rounding of the scores.

    `epsilon` is the spacing of the scores at 1.0; None for fp32, or fp64 with an fp64 queue.
    """
    assert index.dtype == torch.int64
    assert index.shape == (len(queries),)
    assert ((index >= 0) & (index < len(queue))).all()
    scores = unit_scores(queries, queue).nan_to_num(-torch.inf)
    regret = scores.amax(dim=1) - scores.gather(1, index[:, None])[:, 0]
    allowed = ULPS_FP32 * (epsilon or working_epsilon(queue.dtype))
    worst = int(regret.argmax())
    assert (regret <= allowed).all(), f"query {worst} is {regret[worst]:.3e} from its neighbor, allowed {allowed:.1e}"
