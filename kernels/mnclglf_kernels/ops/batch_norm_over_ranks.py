"""batch_norm in PyTorch with the statistics of all ranks: one message between them forward, one backward.

Letters: V views, N images per view and rank, C channels, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnclglf_kernels.layout import memory_format
from mnclglf_kernels.ranks import gather, sum_over_ranks


def combined_moments(gathered: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and biased variance, [V, C] each, from those of equal parts, [W, V, 2, C] (Chan et al. 1979).

    Every rank computes the same bits from the same parts.
    """
    means, variances = gathered.unbind(2)
    mean = means[0] + (means - means[0]).mean(0)  # a sum of differences rounds less than one of means
    return mean, (variances + (means - mean).square()).mean(0)


def torch_batch_norm_over_ranks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    factors: Sequence[float],
    eps: float,
    relu: bool,
    ranks: int,
) -> Tensor:
    """Computes batch_norm over ranks with torch's operations."""
    # In fp16 the native form's slopes could overflow, as they are in x's dtype.
    native = x.device.type == "cpu" and x.dtype != torch.float16 and not torch.compiler.is_compiling()
    views, apply = len(factors) - 1, (_Native if native else _Plain).apply
    y, mean, var = apply(x, weight, bias, residual, views, ranks, eps, relu)
    rows = ranks * x.numel() // mean.numel()
    for running, own in ((running_mean, mean), (running_var, var * (rows / (rows - 1)))):
        if running is not None:
            running.copy_(factors[0] * running + sum(f * new for f, new in zip(factors[1:], own, strict=True)))
    return y


class _Plain(torch.autograd.Function):
    """Returns the result, and mean and biased variance over all ranks, in operations that Inductor fuses."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, residual, views, ranks, eps, relu = operands
        parts = x.unflatten(0, (views, -1)).to(torch.promote_types(x.dtype, torch.float32))
        dims = [d for d in range(parts.dim()) if d not in (0, 2)]
        var, mean = torch.var_mean(parts, dims, correction=0)
        mean, var = combined_moments(gather(torch.stack([mean, var], 1)))
        inverse = (var + eps).rsqrt()
        y = (parts - spread(mean, parts)) * spread(inverse * weight, parts) + spread(bias.expand_as(mean), parts)
        y = y.flatten(0, 1)
        y = y if residual is None else y + residual
        y = (F.relu(y) if relu else y).to(x.dtype)
        ctx.dims, ctx.ranks, ctx.relu, ctx.has_residual = dims, ranks, relu, residual is not None
        ctx.save_for_backward(x, weight, bias, mean, inverse, y if relu else None)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, mean, inverse, y = ctx.saved_tensors
        masked = torch.where(y <= 0, 0, upstream) if ctx.relu else upstream
        parts, given = (t.unflatten(0, (len(mean), -1)).to(mean.dtype) for t in (x, masked))
        normal = (parts - spread(mean, parts)) * spread(inverse, parts)
        sums = torch.stack([given.sum(ctx.dims), (given * normal).sum(ctx.dims)], 1)
        rows = ctx.ranks * x.numel() // mean.numel()
        average, slope = (spread(t / rows, parts) for t in sum_over_ranks(sums).unbind(1))
        gradient = (given - average - normal * slope) * spread(inverse * weight, parts)
        return gradient.flatten(0, 1).to(x.dtype), *of_vectors(sums, weight, bias), *of_others(ctx, masked)


class _Native(torch.autograd.Function):
    """The same on a CPU in torch's native passes: two forward, and three backward beside that of the ReLU."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, residual, views, ranks, eps, relu = operands
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()  # torch writes nothing into an out= of other strides
        dtype, y = torch.promote_types(x.dtype, torch.float32), torch.empty_like(x)
        wide = weight.to(dtype), bias.to(dtype)
        moments, nothing = (x.new_empty(shape, dtype=dtype) for shape in ((views, 2, len(weight)), 0))
        unused = torch.zeros_like(wide[0])  # running statistics, whose dtype is that of the sums
        for part, own in zip(x.chunk(views), moments, strict=True):
            torch.ops.aten.batch_norm_update_stats.out(part, unused, unused, 0.0, out0=own[0], out1=own[1])
        mean, var = combined_moments(gather(moments))
        others = [None] * views if residual is None else residual.chunk(views)
        for part, other, out, center, own in zip(x.chunk(views), others, y.chunk(views), mean, var, strict=True):
            affine(part, *wide, center, own, eps, out, nothing)
            if other is not None:
                out.add_(other)
            if relu:
                out.relu_()
        ctx.ranks, ctx.relu, ctx.has_residual = ranks, relu, residual is not None
        ctx.save_for_backward(x, weight, bias, mean, (var + eps).rsqrt(), y if relu else None)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, mean, inverse, y = ctx.saved_tensors
        # In x's strides: with others torch's gradient of the bias was off by 0.2% in bf16 (measured, AMD EPYC).
        masked = upstream.contiguous(memory_format=memory_format(x))
        if y is not None:
            masked = torch.ops.aten.threshold_backward(masked, y, 0)
        gradient = torch.empty_like(x) if y is None or ctx.has_residual else masked
        views, sums = len(mean), torch.empty_like(mean[:, None].expand(-1, 2, -1))
        columns = x.chunk(views), masked.chunk(views), gradient.chunk(views)
        wide, mask = weight.to(mean.dtype), [False, True, True]
        for part, given, own, *of_view in zip(*columns[:2], sums, mean, inverse, strict=True):
            _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                given, part, wide, None, None, *of_view, True, 0.0, mask
            )
            torch.stack([of_bias, of_weight], out=own)
        rows = ctx.ranks * x.numel() // mean.numel()
        average, slope = (sum_over_ranks(sums) / rows).unbind(1)
        # given - average - slope * inverse * (x - mean), times inverse * weight. The slope is in x's dtype, so the
        # center that it multiplies is computed from the rounded one.
        slope = (-slope * inverse).to(x.dtype)
        center, one, zero = average + slope * mean, torch.ones_like(wide), torch.zeros_like(wide)
        for part, given, result, *of_view in zip(*columns, slope, center, inverse * wide, strict=True):
            by, middle, scale = of_view
            torch.addcmul(given, part, by.view(-1, *[1] * (x.dim() - 2)), out=result)
            affine(result, scale, zero, middle, one, 0.0, result, one[:0])
        return gradient, *of_vectors(sums, weight, bias), *of_others(ctx, masked)


def affine(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, out: Tensor, nothing: Tensor
) -> None:
    """Writes (x - mean) / sqrt(var + eps) * weight + bias, by channel, in one pass; `out` may be x."""
    outs = dict(out=out, save_mean=nothing, save_invstd=nothing)
    torch.ops.aten.native_batch_norm.out(x, weight, bias, mean, var, False, 0.0, eps, **outs)


def of_vectors(sums: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of weight and bias from this rank's sums, [V, 2, C]."""
    of_bias, of_weight = sums.sum(0)
    return of_weight.to(weight.dtype), of_bias.to(bias.dtype)


def of_others(ctx: Any, masked: Tensor) -> tuple[Any, ...]:
    """Returns the gradients of residual, views, ranks, eps and relu."""
    return masked if ctx.has_residual else None, None, None, None, None


def spread(vectors: Tensor, parts: Tensor) -> Tensor:
    """Returns [V, C] vectors in the shape that broadcasts over parts, [V, N, C] or [V, N, C, H, W]."""
    return vectors.view(len(vectors), 1, -1, *[1] * (parts.dim() - 3))
