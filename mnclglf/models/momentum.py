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

    In one multi-tensor kernel, which reads `keep` on the device: PyTorch's fused SGD on |theta_m - theta_o|^2 / 2 with
    learning rate 1 - m. The gradient is theta_m, as its weight decay of 1, less theta_o, as a gradient to climb.

    Args:
        follower: the momentum network.
        online: the network it follows, of the same shape.
        momentum: m.
        keep: bool, 0-D on the device; where false nothing changes.
    """
    torch._fused_sgd_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        [*follower.parameters()],
        [*online.parameters()],
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=1 - momentum,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=(~keep).float(),
    )
