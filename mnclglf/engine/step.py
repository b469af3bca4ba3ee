"""One training step: forward, backward, guarded update, momentum network and queue."""

from __future__ import annotations

import torch
from torch import Tensor

from mnclglf.config import OptimConfig
from mnclglf.data.loader import Batch
from mnclglf.engine.guard import Guard
from mnclglf.methods.method import Losses, Method


def make_optimizer(method: Method, config: OptimConfig) -> torch.optim.SGD:
    """Fused SGD over what the method trains. Its momentum starts at 0, which is what SGD's first step amounts to."""
    parameters = method.trained_parameters()
    optimizer = torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.sgd_momentum, weight_decay=config.weight_decay, fused=True
    )
    for parameter in parameters:
        if config.sgd_momentum:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def train_step(
    method: Method,
    optimizer: torch.optim.SGD,
    guard: Guard,
    batch: Batch,
    *,
    step: int,
    lr: float,
    momentum: float,
    dtype: torch.dtype,
) -> tuple[Losses, Tensor]:
    """Trains on one batch; gives the losses and the gradient's norm, both still on the device.

    Nothing here waits for the device. Where loss, gradient or queue keys are not finite, now or in an earlier step,
    weights, momentum network and queue stay as they are.
    """
    with torch.autocast(batch.indices.device.type, dtype=dtype, enabled=dtype != torch.float32):
        losses = method(batch.views)
    losses.total.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradient_norm = torch.nn.utils.get_total_norm(gradients)
    keys = {} if losses.keys is None else {"keys": losses.keys}
    keep = guard.check(step, {**losses.terms, "gradient": gradient_norm, **keys})
    optimizer.found_inf = (~keep).float()  # pyright: ignore[reportAttributeAccessIssue]  # as torch's GradScaler does
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    method.after_step(losses, batch.indices, momentum=momentum, keep=keep)
    return losses, gradient_norm
