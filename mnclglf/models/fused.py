"""Forward of a ResNet of basic blocks without gradient, by convolutions that do the work of the batch norms too.

Such a convolution applies the batch norm and the ReLU before it as it reads, and returns the statistics of its result,
which the batch norm after it needs. So the result of a block's first batch norm is never in memory.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnclglf.models.batch_norm import BatchNorm, Views, fold_of, update_where_finite
from mnclglf_kernels import convolution
from mnclglf_kernels.ops.batch_norm_over_ranks import combined_moments
from mnclglf_kernels.ops.convolution import scaled
from mnclglf_kernels.ranks import gather

if TYPE_CHECKING:
    from mnclglf.models.encoder import Block, Encoder, ResNet


class Pending(NamedTuple):
    """The result of a convolution, and the batch norm that follows, which has not been applied."""

    y: Tensor  # [V * N, C, H, W]
    scale: Tensor  # [V, C]
    shift: Tensor

    def applied(self) -> Tensor:
        """Returns the result of the batch norm, [V * N, C, H, W], in the dtype of its sums."""
        return scaled(*self)


def set_half(encoder: Encoder, half: bool) -> None:
    """Lets the forwards without gradient compute in fp16, and sum in fp16 where cuDNN can, or no longer.

    A training step gives each convolution its weight in fp16 beside the one that autocast uses (share_casts).
    """
    if half == encoder.half_sums:
        return
    encoder.half_sums = half
    if half:
        device = next(encoder.parameters()).device
        encoder.register_buffer("overflow", torch.zeros((), dtype=torch.bool, device=device), persistent=False)
    else:
        del encoder.overflow
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d) and half:
            layer.register_buffer("half_weight", layer.weight.detach().half(), persistent=False)
        elif isinstance(layer, nn.Conv2d):
            del layer.half_weight


def features_without_gradient(encoder: ResNet, images: Tensor, views: Views | int) -> Tensor:
    """Returns the features, [V * N, F], of V views that share a batch, normalized by their own statistics.

    In fp16 it sets `encoder.overflow` where a statistic is not finite: then the features are NaN, and a running
    statistic keeps its value.
    """
    count = views if isinstance(views, int) else len(views.after)
    device = images.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    outside = torch.get_autocast_dtype(device) if autocast else images.dtype
    dtype = torch.float16 if encoder.half_sums else outside
    statistics: list[Tensor] = []

    def convolve(layer: nn.Conv2d, norm: BatchNorm, x: Tensor, before: Pending | None = None) -> Pending:
        given: dict[str, Any] = {} if before is None else dict(scale=before.scale, shift=before.shift)
        weight = layer.half_weight if encoder.half_sums else layer.weight
        y, mean, var = convolution(
            x,
            cast(Tensor, weight).to(dtype),
            stride=layer.stride[0],
            padding=int(layer.padding[0]),
            views=count,
            half_sums=encoder.half_sums,
            backend=encoder.convolution,
            **given,
        )
        statistics.extend((mean.flatten(), var.flatten()))
        rows = y.numel() // mean.numel()
        return Pending(y, *norm_of(norm, mean, var, rows, views))

    def through(block: Block, x: Tensor) -> Tensor:
        first = convolve(block.conv1, cast(BatchNorm, block.bn1), x)
        second = convolve(block.conv2, cast(BatchNorm, block.bn2), first.y, first)
        shortcut = x
        if block.downsample is not None:
            layer, norm = cast(nn.Sequential, block.downsample)
            shortcut = convolve(cast(nn.Conv2d, layer), cast(BatchNorm, norm), x).applied()
        return F.relu(second.applied() + shortcut).to(dtype)

    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        x = F.relu(convolve(encoder.conv1, encoder.bn1, images.to(dtype)).applied()).to(dtype)
        if encoder.stem == "imagenet":
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for block in encoder.blocks():
            x = through(cast(Any, block), x)
        # Under autocast to bf16 no operator takes bf16 and fp16 together.
        features = torch.flatten(F.adaptive_avg_pool2d(x.to(outside), 1), 1)
    if not encoder.half_sums:
        return features
    finite = torch.cat(statistics).isfinite().all() & features.isfinite().all()
    encoder.overflow.logical_or_(~finite)
    return torch.where(finite, features, torch.nan)


def norm_of(norm: BatchNorm, mean: Tensor, var: Tensor, rows: int, views: Views | int) -> tuple[Tensor, Tensor]:
    """Returns scale and shift, [V, C] each, of a batch norm whose input has these statistics.

    Updates the running statistics, where the result is finite.

    Args:
        norm: the layer.
        mean: [V, C], of this rank.
        var: [V, C], biased, of this rank.
        rows: values per view and channel of this rank.
        views: the views in the batch.
    """
    if norm.ranks > 1:
        mean, var = combined_moments(gather(torch.stack([mean, var], 1)))
        rows *= norm.ranks
    if norm.track_running_stats:
        assert norm.momentum is not None
        kept, *new = fold_of(views, norm.momentum)
        for running, own in ((norm.running_mean, mean), (norm.running_var, var * (rows / (rows - 1)))):
            assert running is not None
            update_where_finite(running, kept * running + sum(w * x for w, x in zip(new, own, strict=True)))
    scale = norm.weight * (var + norm.eps).rsqrt()
    return scale, norm.bias - mean * scale
