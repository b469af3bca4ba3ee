"""How far a result may be from the truth: never further than plain PyTorch in the same dtype, by more than rounding."""

import torch
from torch import Tensor

ULPS_FP32 = 8  # a sum taken in another order, and exp and log, differ from ours by a few units in the last place


def working_epsilon(dtype: torch.dtype) -> float:
    """Spacing at 1.0 of the dtype in which an operator accumulates: fp64 for fp64 input, fp32 for everything else."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def row_maxima(x: Tensor) -> Tensor:
    """[M, ...] -> [M], and a scalar -> [1]: one number a row, so that a row of 1e12 hides no error of a row of 1."""
    return x.double().abs().reshape(len(x) if x.dim() else 1, -1).amax(dim=1)


def assert_as_accurate_as_plain(
    actual: Tensor, plain: Tensor, truth: Tensor, floor: float | Tensor, *, what: str
) -> None:
    """Error of `actual` against fp64 `truth` <= 2 x the error of `plain` + floor, row by row; floor scalar or [M]."""
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert torch.isfinite(actual).all(), f"{what} is not finite"
    error = row_maxima(actual.double() - truth)
    allowed = 2 * row_maxima(plain.double() - truth) + floor
    allowed = torch.where(torch.isnan(allowed), torch.inf, allowed)  # plain PyTorch has no number: any number will do
    worst = int((error - allowed).argmax())
    assert (error <= allowed).all(), f"{what}: row {worst} is off by {error[worst]:.3e}, allowed {allowed[worst]:.3e}"
