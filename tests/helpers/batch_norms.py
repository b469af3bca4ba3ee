"""Batch norm by loops over views and channels in fp64, and the check of the operator against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tolerance import ULPS_FP32, assert_as_accurate_as_plain, working_epsilon
from torch import Tensor

from mnclglf_kernels import Backend, batch_norm

EPS = 1e-5
VARIANTS = [(False, False), (False, True), (True, False), (True, True)]  # residual, relu
VARIANT_NAMES = ["plain", "relu", "residual", "residual and relu"]


class Case(NamedTuple):
    """Arguments of a call: x and residual of one shape, weight and bias of one value per channel."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None

    def leaves(self, dtype: torch.dtype | None = None) -> Case:
        """Returns leaves that share the memory of these, or copies in another dtype."""
        return self.each(lambda x: x.detach().to(dtype or x.dtype).requires_grad_())

    def each(self, function: Callable[[Tensor], Tensor]) -> Case:
        """Returns a function of each tensor."""
        residual = None if self.residual is None else function(self.residual)
        return Case(function(self.x), function(self.weight), function(self.bias), residual)

    def tensors(self) -> list[Tensor]:
        return [x for x in self if x is not None]


def case(
    shape: Sequence[int], dtype: torch.dtype, residual: bool = True, vectors: torch.dtype | None = None, seed: int = 0
) -> Case:
    """Draws arguments whose means and deviations differ by channel and by image; images are in channels_last."""
    g = torch.Generator().manual_seed(seed)
    channels, spread = shape[1], [1] * (len(shape) - 2)
    scale = torch.rand(1, channels, *spread, generator=g) + 0.5
    offset = torch.randn(1, channels, *spread, generator=g) + torch.randn(shape[0], 1, *spread, generator=g)
    x, other = (torch.randn(shape, generator=g) for _ in range(2))
    weight, bias = torch.randn(2, channels, generator=g).to(vectors or dtype).unbind()
    dense = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    x, other = (x.to(dtype, memory_format=dense) for x in (x * scale + offset, other))
    return Case(x, weight, bias, other if residual else None)


def upstream_of(drawn: Case) -> Tensor:
    return torch.randn(drawn.x.shape, generator=torch.Generator().manual_seed(9)).to(drawn.x.dtype)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and biased variance per channel of one view, [C] each, from two passes."""
    found = []
    for channel in range(x.shape[1]):
        values = x[:, channel].flatten()
        mean = values.sum() / len(values)
        found.append(torch.stack([mean, (values - mean).square().sum() / len(values)]))
    means, variances = torch.stack(found, 1)
    return means, variances


def oracle(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *, views: int, relu: bool) -> Tensor:
    """Normalizes view by view and channel by channel; differentiable."""
    size, parts = len(x) // views, []
    for view in range(views):
        part = x[view * size : (view + 1) * size]
        means, variances = statistics(part)
        channels = [
            (part[:, c] - means[c]) / (variances[c] + EPS).sqrt() * weight[c] + bias[c] for c in range(x.shape[1])
        ]
        parts.append(torch.stack(channels, 1))
    y = torch.cat(parts)
    if residual is not None:
        y = y + residual
    return torch.where(y <= 0, 0, y) if relu else y


def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *, views: int, relu: bool) -> Tensor:
    """Computes the same with PyTorch's functions, as a network without the operator does."""
    y = torch.cat([F.batch_norm(part, None, None, weight, bias, training=True, eps=EPS) for part in x.chunk(views)])
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def per_channel(x: Tensor) -> Tensor:
    """Returns x as [C, values], so that a tolerance holds channel by channel."""
    return x.transpose(0, 1).flatten(1) if x.dim() > 1 else x


class Scales(NamedTuple):
    """Magnitudes per channel to which rounding errors are proportional, [C] each."""

    forward: Tensor  # of the result
    gradient: Tensor  # of the gradient of x
    weight: Tensor
    bias: Tensor


def scales_of(drawn: Case, upstream: Tensor, views: int) -> Scales:
    """Sums the magnitudes of the terms of each result. A mean far from 0 magnifies what it rounds."""
    weight, bias = drawn.weight.double().abs(), drawn.bias.double().abs()
    found = []
    for part, g in zip(drawn.x.double().chunk(views), upstream.double().chunk(views), strict=True):
        means, variances = statistics(part)
        inverse = (variances + EPS).rsqrt()
        normal = inverse[:, None] * (per_channel(part) - means[:, None]).abs()
        far, g = inverse * means.abs(), per_channel(g).abs()
        greatest = normal.amax(1) + far
        gradient = inverse * weight * (g.amax(1) + g.mean(1) * (1 + greatest).square())
        found.append([greatest * weight + bias, gradient, (g * normal).sum(1) + g.sum(1) * far, g.sum(1)])
    forward, gradient, of_weight, of_bias = (torch.stack(x) for x in zip(*found, strict=True))
    other = 0 if drawn.residual is None else per_channel(drawn.residual.double()).abs().amax(1)
    return Scales(forward.amax(0) + other, gradient.amax(0), of_weight.sum(0), of_bias.sum(0))


def check(
    drawn: Case,
    *,
    views: int,
    relu: bool,
    backend: Backend,
    upstream: Tensor | None = None,
    device: torch.device | str = "cpu",
    fork: bool = False,
) -> None:
    """Compares results and gradients with the oracle in fp64, and the errors with those of plain PyTorch.

    With `fork` the result is used twice, and the second use gives a gradient of its own.
    """
    how: dict[str, Any] = dict(views=views, relu=relu)
    there = drawn.each(lambda x: x.to(device))
    ours, theirs, exact = there.leaves(), there.leaves(), drawn.leaves(torch.float64)
    given: dict[str, Any] = dict(residual=ours.residual, eps=EPS, backend=backend, **how)
    y, *again = batch_norm(*ours[:3], fork=True, **given) if fork else [batch_norm(*ours[:3], **given)]
    assert all(torch.equal(x, y) for x in again)
    truth, expected = oracle(*exact, **how), plain(*theirs, **how)
    assert y.dtype == drawn.x.dtype
    upstream = upstream_of(drawn) if upstream is None else upstream
    if fork:  # in x's strides: torch's own sums of bf16 gradients in others are off by more than a rounding
        upstream = torch.empty_like(drawn.x).copy_(upstream)
    second = upstream.roll(1, 0) / 2 if fork else torch.zeros_like(upstream)
    scales = scales_of(drawn, upstream.abs() + second.abs(), views)
    if relu:  # within rounding of 0 it may pass all of a gradient or nothing: no gradient comes from there
        least = (4 * torch.finfo(y.dtype).eps * scales.forward).reshape(-1, *[1] * (y.dim() - 2))
        before = oracle(*drawn.leaves(torch.float64), views=views, relu=False).detach()
        if (before.abs() < least).any():
            upstream, second = (x * (before.abs() > least) for x in (upstream, second))
    results = []
    for outs, side in (([y, *again], ours), ([expected], theirs), ([truth], exact)):
        parts = [upstream, second] if len(outs) == 2 else [upstream.to(outs[0].dtype) + second]
        parts = [part.to(out.device, out.dtype) for part, out in zip(parts, outs, strict=True)]
        found = [outs[0].detach(), *torch.autograd.grad(outs, side.tensors(), parts)]
        results.append([x.cpu() for x in found])
    names = ["y", "gradient of x", "gradient of weight", "gradient of bias", "gradient of residual"]
    scale_of = dict(zip(names, [*scales, torch.zeros_like(scales.bias)], strict=True))
    for name, *tensors in zip(names, *results, strict=False):
        actual, other, true = (per_channel(x) for x in tensors)
        stored = torch.finfo(actual.dtype).eps / 2 * true.abs() + torch.finfo(actual.dtype).tiny
        # Twice: in fp64 the truth rounds as much as the result.
        summed = 2 * ULPS_FP32 * working_epsilon(drawn.x.dtype) * scale_of[name]
        allowed = summed + (stored.amax(1) if stored.dim() > 1 else stored)
        assert_as_accurate_as_plain(actual, other, true, allowed, what=name)
