"""LARS, layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017, Algorithm 1)."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT


class LARS(torch.optim.Optimizer):
    """SGD with momentum, the step of each tensor w with gradient g scaled by trust |w| / (|g| + weight_decay |w|).

    Every tensor is adapted, biases too, and without weight decay as well, as timm's Lars does with always_adapt=True
    and apex's LARC with clip=False; a ratio is not clipped. Where |w| or |g| is 0 the ratio is 1. The learning rate
    multiplies the whole of the momentum, as in PyTorch's SGD and in these two; Algorithm 1 adds it to the momentum with
    each gradient, which is the same while it is constant. Nothing in a step waits for the device.

    Args:
        params: as of any optimizer.
        lr: learning rate; may be changed in `param_groups` between steps.
        momentum: share of the last update that is kept.
        weight_decay: beta, of the L2 penalty.
        trust_coefficient: eta.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust_coefficient))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient, decay = weight.grad, group["weight_decay"]
                norm, gradient_norm = weight.norm(), gradient.norm()
                ratio = group["trust"] * norm / (gradient_norm + decay * norm)
                ratio = torch.where((norm > 0) & (gradient_norm > 0), ratio, 1.0)
                update = ratio * (gradient + decay * weight)
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                weight.sub_(state["momentum_buffer"], alpha=group["lr"])
