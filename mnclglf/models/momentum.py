"""The momentum (target) network: a copy whose weights are a moving average of the online network's."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def momentum_copy(module: nn.Module) -> nn.Module:
    """Returns a copy of `module` without gradients, with the same weights and batch-norm statistics of its own."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def update_momentum(target: nn.Module, online: nn.Module, momentum: float | Tensor, should_update: Tensor) -> None:
    """Sets theta_m to m theta_m + (1 - m) theta_o over all parameters (Algorithm 1); buffers stay each network's own.

    EMA as one fused SGD step: parameter theta_m, gradient theta_o, maximize, weight_decay 1, lr 1 - m; found_inf skips
    it. That is one multi-tensor kernel for all parameters, which reads `should_update` on the device: no host sync.

    Args:
        target: the momentum network.
        online: the online network, of the same shape.
        momentum: m, a number or 0-D on the device; fp64, as 1 - m of a rounded m near 1 is far from it.
        should_update: bool, 0-D on the device; where false nothing changes.
    """
    rate = 1 - momentum
    if isinstance(rate, Tensor) and rate.is_cuda:
        rate = rate.float()  # which the kernel reads on a GPU
    torch._fused_sgd_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        [*target.parameters()],  # theta_m
        [*online.parameters()],  # theta_o in the gradient's place
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=rate,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=(~should_update).float(),
    )
