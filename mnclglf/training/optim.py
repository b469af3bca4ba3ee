"""The optimizers of pre-training: one function each, one row each in OPTIMIZERS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mnclglf.config import OptimConfig, require
from mnclglf.methods.base import Method
from mnclglf.training.lars import LARS

Groups = Sequence[list[nn.Parameter]]
"""Parameters that follow the schedule; then, with a constant predictor rate, the predictor's parameters."""


def sgd(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    """Makes SGD with momentum, in one fused kernel over all weights."""
    optimizer = torch.optim.SGD(
        [{"params": parameters} for parameters in groups],
        lr=config.lr,
        momentum=config.sgd_momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
    # Momentum starts at 0, which gives the same first step as no buffer. Without one, the fused kernel allocates
    # uninitialized buffers, and a first step that found_inf skips would leave them so.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if config.sgd_momentum:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def lars(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    """Makes LARS with the settings that BYOL's and SimCLR's authors pre-train with.

    Parameters of at most one dimension (biases and norms) are neither adapted nor decayed.
    """
    made: list[dict[str, Any]] = []
    for parameters in groups:
        made.append({"params": [p for p in parameters if p.dim() > 1]})
        made.append({"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, "adapts": False})
    optimizer = LARS(made, config.lr, momentum=config.sgd_momentum, weight_decay=config.weight_decay)
    # It would make them in its first step. A recorded step would set them to 0 in each replay.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


OPTIMIZERS: dict[str, Callable[[Groups, OptimConfig], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "lars": lars,
}


def check_optimizer(name: str) -> None:
    """Raises ValueError unless there is an optimizer of this name."""
    require(name in OPTIMIZERS, f"optimizer {name!r} is none of {', '.join(OPTIMIZERS)}")


def make_optimizer(method: Method, config: OptimConfig) -> torch.optim.Optimizer:
    """Makes the optimizer of a method.

    Its learning rates are tensors on the device, so that a CUDA graph sees a new rate. While `found_inf` is 1 on the
    device, a step changes nothing: that keeps a non-finite step out.
    """
    check_optimizer(config.optimizer)
    groups = parameter_groups(method, constant_predictor_lr=config.constant_predictor_lr)
    optimizer = OPTIMIZERS[config.optimizer](groups, config)
    for group in optimizer.param_groups:
        group["lr"] = rate_tensor(config.lr, groups[0][0])  # a tensor of its own for each group
    return optimizer


def scheduled_groups(optimizer: torch.optim.Optimizer, config: OptimConfig) -> list[dict[str, object]]:
    """Returns the parameter groups that follow the schedule: all except a predictor with a constant rate."""
    groups = optimizer.param_groups  # the predictor's are the second half: each optimizer splits both parts alike
    return groups[: len(groups) // 2] if config.constant_predictor_lr else groups


def rate_tensor(rate: float | Tensor, parameter: Tensor) -> Tensor:
    """Returns a learning rate beside a parameter and in its dtype; in fp32 on a GPU, as fused kernels want it."""
    return torch.as_tensor(rate).to(parameter.device, torch.float32 if parameter.is_cuda else parameter.dtype)


def parameter_groups(method: Method, *, constant_predictor_lr: bool) -> list[list[nn.Parameter]]:
    """Returns what trains at the schedule's learning rate; then, where its rate is to be constant, the predictor.

    Raises:
        ValueError: the method has no predictor.
    """
    trained = method.trained_parameters()
    if not constant_predictor_lr:
        return [trained]
    predictor = {parameter for name, parameter in method.named_parameters() if name.startswith("predictor.")}
    require(bool(predictor), f"{type(method).__name__} has no predictor; leave --constant-predictor-lr out")
    return [[p for p in trained if p not in predictor], [p for p in trained if p in predictor]]
