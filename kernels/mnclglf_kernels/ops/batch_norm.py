"""batch_norm: batch normalization with statistics per view, and the residual addition and ReLU that follow it.

Ioffe and Szegedy 2015, Algorithm 1. Letters: V views, N images per view, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mnclglf_kernels.backend import Backend, resolve
from mnclglf_kernels.checks import check_floating


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    views: int = 1,
    momentum: float = 0.1,
    fold: Sequence[float] | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Normalizes each channel of each view by the mean and variance of that view, then adds `residual`, then ReLU.

    A batch holds its V views one after the other, N rows each. The result is that of one call of torch's batch norm in
    train mode per view, with one rounding instead of up to three. The running statistics are those after these calls in
    order. Sums are in fp32 (fp64 for fp64) and in a fixed order.

    Args:
        x: [V * N, C, H, W], or [V * N, C] rows.
        weight: gamma, [C].
        bias: beta, [C].
        running_mean: [C], updated in place; None leaves the running statistics out.
        running_var: [C], updated in place, of unbiased variances; None with `running_mean` alone.
        views: V.
        momentum: fraction of a running statistic that each view replaces.
        fold: V + 1 factors in place of `momentum`: of a running statistic as it was, and of that of each view.
        eps: added to the variance.
        residual: tensor of x's shape.
        relu: true to set negative results to 0.
        backend: see `resolve`.

    Returns:
        Tensor of the shape and dtype of x, channels_last for images on the Triton kernels. Differentiable with respect
        to x, weight, bias and residual.

    Raises:
        ValueError: shapes do not fit, or a view has a single value per channel.
        TypeError: a dtype is not floating point.
    """
    check_batch(x, views)
    check_channels(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean or running_var is None; give both or neither")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {residual.dtype} of shape {tuple(residual.shape)}, x {x.dtype} of {tuple(x.shape)}; "
            "they must agree"
        )
    factors = running_factors(momentum, views) if fold is None else [*fold]
    if len(factors) != views + 1:
        raise ValueError(f"fold has {len(factors)} factors; {views} views need {views + 1}")
    given = [x for x in (x, weight, bias, running_mean, running_var, residual) if x is not None]
    if resolve(backend, *given) == "triton" and x.numel():  # an empty grid cannot be launched
        operands = x, weight, bias, running_mean, running_var, residual
        from mnclglf_kernels._triton.batch_norm import differentiable_batch_norm  # it needs triton

        return differentiable_batch_norm(*operands, factors, eps, relu)
    return torch_batch_norm(x, weight, bias, running_mean, running_var, residual, factors, eps, relu)


def running_factors(momentum: float, views: int) -> list[float]:
    """Returns the factors of running statistics that take in the views one by one: of the old one, of each view."""
    kept = 1 - momentum
    return [kept**views, *(momentum * kept**after for after in reversed(range(views)))]


def check_batch(x: Tensor, views: int) -> None:
    """Raises ValueError or TypeError unless x is [V * N, C, H, W] or [V * N, C] with two values per channel or more."""
    check_floating("x", x)
    if x.dim() not in (2, 4):
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [V * N, C, H, W] or [V * N, C]")
    if views < 1 or len(x) % views:
        raise ValueError(f"views {views} do not divide a batch of {len(x)}; a batch holds whole views")
    if x.numel() and x.numel() // (views * x.shape[1]) == 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, one value per channel and view; a variance needs two or more")


def check_channels(x: Tensor, **vectors: Tensor | None) -> None:
    """Raises ValueError or TypeError unless each given vector is [C] and floating point."""
    for name, vector in vectors.items():
        if vector is not None:
            check_floating(name, vector)
            if vector.shape != x.shape[1:2]:
                raise ValueError(f"{name} has shape {tuple(vector.shape)}; x has {x.shape[1]} channels")


def torch_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    factors: Sequence[float],
    eps: float,
    relu: bool,
) -> Tensor:
    """Computes batch_norm with torch's batch norm per view."""
    views = len(factors) - 1
    # momentum 1: each view's own statistics, the variances unbiased
    means, variances = (None if x is None else x.new_zeros(views, *x.shape) for x in (running_mean, running_var))
    parts: list[Tensor] = []
    for view, part in enumerate(x.chunk(views)):
        own = (None, None) if means is None or variances is None else (means[view], variances[view])
        parts.append(F.batch_norm(part, *own, weight, bias, training=True, momentum=1.0, eps=eps))
    y = parts[0] if views == 1 else torch.cat(parts)
    if residual is not None:
        y = y + residual
    for running, found in ((running_mean, means), (running_var, variances)):
        if running is not None and found is not None:
            taken = sum(factor * own for factor, own in zip(factors[1:], found, strict=True))
            running.mul_(factors[0]).add_(taken)
    return F.relu(y) if relu else y
