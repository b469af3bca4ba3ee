"""LARS, layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


class LARS(torch.optim.Optimizer):
    """SGD with momentum, with the step of each tensor w scaled by trust |w| / (|g| + weight_decay |w|).

    g is the gradient of w. If |w| or |g| is 0, the ratio is 1. The ratio is not clipped. Tensors without weight decay
    are adapted too, as in timm's Lars with always_adapt=True and apex's LARC with clip=False.

    The learning rate multiplies the momentum buffer, as in PyTorch's SGD and in these two. Algorithm 1 multiplies each
    gradient by it before the momentum, which is the same while the rate is constant. A step never waits for the device.

    Args:
        params: parameters or groups. A group with adapts=False has ratio 1 (for biases and norms of a whole network);
            every tensor of the other groups is adapted, biases too.
        lr: learning rate; may be changed in `param_groups` between steps, and may be a 0-D tensor.
        momentum: fraction of the last update that is kept.
        weight_decay: coefficient of the L2 penalty, beta.
        trust_coefficient: coefficient of the ratio, eta.

    Attributes:
        found_inf: None, or a 0-D tensor on the device: if it is not 0, a step changes neither weights nor momentum.
            PyTorch's fused optimizers read the same attribute.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: ParamsT | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust_coefficient, adapts=True)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = self._update(weight, weight.grad, group)
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                self._apply(weight, state["momentum_buffer"], update, group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Returns the gradient with weight decay, scaled by the tensor's ratio."""
        decay = group["weight_decay"]
        if not group["adapts"]:
            return gradient + decay * weight
        norm, gradient_norm = weight.norm(), gradient.norm()
        ratio = group["trust"] * norm / (gradient_norm + decay * norm)
        ratio = torch.where((norm > 0) & (gradient_norm > 0), ratio, 1.0)
        return ratio * (gradient + decay * weight)

    def _apply(self, weight: Tensor, buffer: Tensor, update: Tensor, group: dict[str, Any]) -> None:
        """Adds the update to the momentum, and the momentum times the learning rate to the weight."""
        if self.found_inf is None:
            buffer.mul_(group["momentum"]).add_(update)
            weight.sub_(buffer, alpha=float(group["lr"]))
            return
        # torch.where, not a product with 0: the update may be NaN, and 0 times NaN is NaN.
        skip = self.found_inf > 0
        buffer.copy_(torch.where(skip, buffer, buffer * group["momentum"] + update))
        weight.copy_(torch.where(skip, weight, weight - group["lr"] * buffer))
