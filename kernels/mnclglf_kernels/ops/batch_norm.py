"""batch_norm: batch normalization with statistics per view, and the residual addition and ReLU that follow it.

Ioffe and Szegedy 2015, Algorithm 1. Letters: V views, N images per view, C channels, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnclglf_kernels.backend import Backend, resolve
from mnclglf_kernels.checks import check_floating
from mnclglf_kernels.layout import memory_format
from mnclglf_kernels.ops.batch_norm_over_ranks import torch_batch_norm_over_ranks


class Settings(TypedDict, total=False):
    """Keywords of batch_norm."""

    views: int
    momentum: float
    fold: Sequence[float] | None
    eps: float
    residual: Tensor | None
    relu: bool
    ranks: int
    backend: Backend


Running = Tensor | None


@overload
def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Running = None,
    running_var: Running = None,
    *,
    fork: Literal[False] = False,
    **settings: Unpack[Settings],
) -> Tensor: ...


@overload
def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Running = None,
    running_var: Running = None,
    *,
    fork: Literal[True],
    **settings: Unpack[Settings],
) -> tuple[Tensor, Tensor]: ...


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Running = None,
    running_var: Running = None,
    *,
    views: int = 1,
    momentum: float = 0.1,
    fold: Sequence[float] | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    fork: bool = False,
    ranks: int = 1,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
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
        fork: true to return the result twice, for its two uses in a residual network. Both tensors share memory. Their
            gradients are added as the Triton kernels read them, which saves a pass that adds them.
        ranks: W, over how many processes of torch.distributed's default group, all of them or 1, statistics are taken.
            Each rank holds N / W images of every view and calls this at the same time, in the same shape. Mean,
            variance and running statistics are those of all N images, the same bits on each rank. The gradient of x is
            that of the sum of all ranks' losses; those of weight and bias are this rank's part of theirs.
        backend: see `resolve`.

    Returns:
        Tensor of the shape and dtype of x, channels_last for images on the Triton kernels; two with `fork`.
        Differentiable with respect to x, weight, bias and residual.

    Raises:
        ValueError: shapes do not fit, a view has a single value per channel, or the group has not W processes.
        TypeError: a dtype is not floating point.
    """
    check_batch(x, views, ranks)
    check_channels(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    check_running(running_mean=running_mean, running_var=running_var)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {residual.dtype} of shape {tuple(residual.shape)}, x {x.dtype} of {tuple(x.shape)}; "
            "they must agree"
        )
    if fold is not None and len(fold) != views + 1:
        raise ValueError(f"fold has {len(fold)} factors; {views} views need {views + 1}")
    operands = x, weight, bias, running_mean, running_var, residual
    given = [x for x in operands if x is not None]
    ranks = ranks if x.numel() else 1  # no rank has a message to send
    factors = running_factors(momentum, views) if fold is None else [*fold]
    if resolve(backend, *given) == "triton" and x.numel():  # an empty grid cannot be launched
        from mnclglf_kernels._triton.batch_norm import differentiable_batch_norm  # it needs triton

        y, again = differentiable_batch_norm(*operands, factors, eps, relu, ranks)
    elif ranks > 1:
        y = again = torch_batch_norm_over_ranks(*operands, factors, eps, relu, ranks)
    else:
        y = again = torch_batch_norm(*operands, views, momentum, fold, eps, relu)
    return (y, again) if fork else y


def running_factors(momentum: float, views: int) -> list[float]:
    """Returns the factors of running statistics that take in the views one by one: of the old one, of each view."""
    kept = 1 - momentum
    return [kept**views, *(momentum * kept**after for after in reversed(range(views)))]


def check_batch(x: Tensor, views: int, ranks: int = 1) -> None:
    """Raises ValueError or TypeError unless x is [V * N, C, H, W] or [V * N, C] with two values per channel or more."""
    if ranks != 1 and ranks != (processes := dist.get_world_size() if dist.is_initialized() else 1):
        raise ValueError(f"ranks {ranks} must be 1 or the number of processes in the default group, {processes}")
    check_floating("x", x)
    if x.dim() not in (2, 4) or not x.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be [V * N, C, H, W] or [V * N, C], with a channel or more"
        )
    if views < 1 or len(x) % views:
        raise ValueError(f"views {views} do not divide a batch of {len(x)}; a batch holds whole views")
    if x.numel() and ranks * x.numel() // (views * x.shape[1]) == 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, one value per channel and view; a variance needs two or more")


def check_channels(x: Tensor, **vectors: Tensor | None) -> None:
    """Raises ValueError or TypeError unless each given vector is [C] and floating point."""
    for name, vector in vectors.items():
        if vector is not None:
            check_floating(name, vector)
            if vector.shape != x.shape[1:2]:
                raise ValueError(f"{name} has shape {tuple(vector.shape)}; x has {x.shape[1]} channels")


def check_running(**vectors: Tensor | None) -> None:
    """Raises ValueError unless both running statistics can be written in place, or both are None."""
    missing = [name for name, vector in vectors.items() if vector is None]
    if len(missing) == 1:
        raise ValueError(f"{missing[0]} is None and the other is not; give both running statistics or neither")
    for name, vector in vectors.items():
        if vector is not None and not vector.is_contiguous():
            raise ValueError(f"{name} has strides {vector.stride()}; it is written in place and must be contiguous")


Pair = tuple[Tensor | None, Tensor | None]  # running mean and variance


def torch_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    views: int,
    momentum: float,
    fold: Sequence[float] | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """Computes batch_norm with torch's batch norm per view."""
    running: Pair = running_mean, running_var
    pairs = [running] * views
    if fold is not None:  # with momentum 1 a call leaves its own statistics
        momentum, pairs = 1.0, [(zero_statistic(running_mean), zero_statistic(running_var)) for _ in range(views)]
    in_one = views > 1 and x.device.type == "cpu" and x.numel() and not torch.compiler.is_compiling()
    apply = _InOneTensor.apply if in_one else concatenated
    y = apply(x, weight, bias, residual, pairs, momentum, eps, relu)
    if fold is not None and x.numel():
        for old, *own in zip(running, *pairs, strict=True):
            if old is not None:
                old.mul_(fold[0]).add_(sum(factor * new for factor, new in zip(fold[1:], own, strict=True)))
    return y


def zero_statistic(x: Tensor | None) -> Tensor | None:
    """Returns zeros for momentum 1 to replace; 0 times uninitialized memory may be NaN."""
    return None if x is None else torch.zeros_like(x)


def concatenated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    pairs: Sequence[Pair],
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    """Normalizes view by view and concatenates the results."""
    parts = [
        F.batch_norm(part, *pair, weight, bias, training=True, momentum=momentum, eps=eps)
        for part, pair in zip(x.chunk(len(pairs)), pairs, strict=True)
    ]
    y = torch.cat(parts) if len(parts) > 1 else parts[0]
    y = y if residual is None else y.add_(residual)
    return F.relu(y, inplace=True) if relu else y


class _InOneTensor(torch.autograd.Function):
    """The same in fewer passes on a CPU: each view's part is written where it stays, and finished in the cache."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        x, weight, bias, residual, pairs, momentum, eps, relu = operands
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()  # torch writes nothing into an out= of other strides
        y, views = torch.empty_like(x), len(pairs)
        means, deviations = weight.new_empty(2, views, len(weight))
        others = [None] * views if residual is None else residual.chunk(views)
        columns = x.chunk(views), others, y.chunk(views), means, deviations, pairs
        for part, other, out, mean, deviation, pair in zip(*columns, strict=True):
            outs = dict(out=out, save_mean=mean, save_invstd=deviation)
            torch.ops.aten.native_batch_norm.out(part, weight, bias, *pair, True, momentum, eps, **outs)
            if other is not None:
                out.add_(other)
            if relu:
                out.relu_()
        ctx.eps, ctx.relu, ctx.has_residual = eps, relu, residual is not None
        ctx.save_for_backward(x, weight, means, deviations, y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, means, deviations, y = ctx.saved_tensors
        views, gradient = len(means), torch.empty_like(x)
        # In x's strides: with others torch's gradient of the bias was off by 0.2% in bf16 (measured, AMD EPYC).
        upstream = masked = arriving[0].contiguous(memory_format=memory_format(x))
        if ctx.relu:  # a part is read before it is overwritten
            masked = torch.empty_like(x) if ctx.has_residual else gradient
        ys: Sequence[Tensor | None] = [None] * views if y is None else y.chunk(views)
        columns = x.chunk(views), ys, upstream.chunk(views), masked.chunk(views), gradient.chunk(views)
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        # From the last view on, as autograd adds the gradients of weight and bias: equal to the bit.
        for part, out, given, passed, result, mean, deviation in reversed(
            [*zip(*columns, means, deviations, strict=True)]
        ):
            if out is not None:
                torch.ops.aten.threshold_backward.grad_input(given, out, 0, grad_input=passed)
            of_x, *vectors = torch.ops.aten.native_batch_norm_backward(
                passed, part, weight, None, None, mean, deviation, True, ctx.eps, [True] * 3
            )
            result.copy_(of_x)
            of_weight += vectors[0]
            of_bias += vectors[1]
        return gradient, of_weight, of_bias, masked if ctx.has_residual else None, None, None, None, None
