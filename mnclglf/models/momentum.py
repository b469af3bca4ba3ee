"""The momentum network: a copy whose weights follow the online network's as a moving average."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` with the same weights and its own batch-norm statistics, that no gradient reaches."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def update_momentum(follower: nn.Module, online: nn.Module, momentum: float, keep: Tensor) -> None:
    """theta_m <- m theta_m + (1 - m) theta_o over all parameters (Algorithm 1); buffers stay each network's own.

    Args:
        follower: the momentum network.
        online: the network it follows, of the same shape.
        momentum: m.
        keep: bool, 0-D on the device; where false nothing changes.
    """
    followers: list[Tensor] = [*follower.parameters()]
    targets: list[Tensor] = [*online.parameters()]
    weight = keep.to(followers[0].dtype) * (1 - momentum)
    torch._foreach_lerp_(followers, targets, [weight] * len(followers))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
