"""One training step: forward, backward, guarded update, momentum network and queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mnclglf.config import EngineConfig, OptimConfig
from mnclglf.data.batches import Batch
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


def make_forward(method: Method, config: EngineConfig) -> Callable[[Sequence[Tensor]], Losses]:
    """The method's forward, compiled where the configuration asks for it; eager else."""
    if not config.compile:
        return method
    forward = torch.compile(method, fullgraph=True, mode="reduce-overhead" if config.graphs else None)

    def begin_and_forward(views: Sequence[Tensor]) -> Losses:
        torch.compiler.cudagraph_mark_step_begin()  # the last step's outputs may be overwritten now
        return forward(views)

    return begin_and_forward if config.graphs else forward


def train_step(
    method: Method,
    forward: Callable[[Sequence[Tensor]], Losses],
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

    `forward` is what `make_forward` made of `method`, which is updated after it, outside of what may be compiled.
    Nothing here waits for the device. Where loss, gradient or queue keys are not finite, now or in an earlier step,
    weights, momentum network and queue stay as they are.
    """
    with torch.autocast(batch.indices.device.type, dtype=dtype, enabled=dtype != torch.float32):
        losses = forward(batch.views)
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
