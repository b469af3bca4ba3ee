"""Batch normalization as self-supervised training needs it: statistics per view."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # the base of all of them

from mnclglf_kernels import Backend, batch_norm
from mnclglf_kernels.ops.batch_norm import Settings, running_factors

Fork = tuple[Tensor, Tensor]  # one result, for two uses whose gradients are added as they are read


class Views(NamedTuple):
    """The views in a batch, one after the other, and the place of each in the order of the running statistics.

    A network that sees all views of a step in one batch needs only their number. Views in several batches need their
    places, as running statistics are those of one forward per view, in the order of the views.

    Attributes:
        after: for each view, the number of views of this step that come later.
        decays: number of views by which this batch ages the running statistics as they were before the step.
    """

    after: tuple[int, ...]
    decays: int

    def factors(self, momentum: float) -> list[float]:
        """Returns the factors of a running statistic as it was, and of that of each view, after the whole step."""
        return [(1 - momentum) ** self.decays, *(momentum * (1 - momentum) ** after for after in self.after)]


def fold_of(views: Views | int, momentum: float) -> list[float]:
    """Returns the factors of a running statistic as it was, and of that of each view of a batch."""
    return running_factors(momentum, views) if isinstance(views, int) else views.factors(momentum)


def update_where_finite(running: Tensor | None, new: Tensor | None) -> None:
    """Sets a running statistic, if there is one, to its new values that are finite."""
    if running is not None and new is not None:
        running.copy_(torch.where(new.isfinite(), new, running))


class BatchNorm(_BatchNorm):
    """Batch norm of [V * N, C, H, W] images or [V * N, C] rows, with a residual addition and a ReLU that follow.

    In train mode each view has statistics of its own, and the running ones take in the views in order.

    Attributes:
        backend: backend of the operator, see mnclglf_kernels.resolve.
        after_half: whether the inputs of forwards without gradient may have overflowed in fp16, see fused.py: a running
            statistic then stays where the new one is not finite.
        ranks: number of processes over which train mode takes statistics, 1 or all of the default group.
    """

    backend: Backend = "auto"
    after_half: bool = False
    ranks: int = 1

    def forward(
        self, input: Tensor, views: Views | int = 1, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        if self.training:
            weight, bias, *running = self._vectors()
            guarded = self.after_half and not torch.is_grad_enabled()
            updated = [x if x is None else x.clone() for x in running] if guarded else running
            y = batch_norm(input, weight, bias, *updated, **self._settings(views, residual, relu))
            if guarded:
                for old, new in zip(running, updated, strict=True):
                    update_where_finite(old, new)
            return y
        normalized = super().forward(input)
        if residual is not None:
            normalized = normalized + residual
        return F.relu(normalized, inplace=True) if relu else normalized

    def fork(self, input: Tensor, views: Views | int = 1, residual: Tensor | None = None) -> Fork:
        """Returns the result, after the ReLU, for each of its two uses."""
        if self.training and torch.is_grad_enabled():
            return batch_norm(input, *self._vectors(), fork=True, **self._settings(views, residual, relu=True))
        y = self(input, views, residual, relu=True)
        return y, y

    def _vectors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if not self.track_running_stats:
            return self.weight, self.bias, None, None
        return self.weight, self.bias, self.running_mean, self.running_var

    def _settings(self, views: Views | int, residual: Tensor | None, relu: bool) -> Settings:
        assert self.momentum is not None, "a cumulative average has no momentum"
        return {  # a literal, as Dynamo does not trace a call of a TypedDict
            "views": views if isinstance(views, int) else len(views.after),
            "momentum": self.momentum,
            "fold": None if isinstance(views, int) else fold_of(views, self.momentum),
            "eps": self.eps,
            "residual": residual,
            "relu": relu,
            "ranks": self.ranks,
            "backend": self.backend,
        }

    def _check_input_dim(self, input: Tensor) -> None:
        """Accepts any shape that the operator takes; the base class asks for this function."""


class Stack(nn.Sequential):
    """Layers one after the other, of which batch norms learn how many views the batch has, and apply the ReLU."""

    def forward(self, input: Tensor, views: Views | int = 1) -> Tensor:
        layers = [*self]
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(layer, BatchNorm):
                input = layer(input, views, relu=isinstance(following, nn.ReLU))
            elif not isinstance(layer, nn.ReLU):
                input = layer(input)
        return input


class Network(nn.Sequential):
    """Networks one after the other, each of which takes the views in its batch: an encoder and heads."""

    def forward(self, input: Tensor, views: Views | int = 1) -> Tensor:
        for network in self:
            input = network(input, views)
        return input


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Returns every batch normalization in `module`."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def without_batch_counters(module: nn.Module) -> None:
    """Drops num_batches_tracked, which only a momentum of None reads: it costs 20 kernels per ResNet-18 forward."""
    for layer in batch_norms(module):
        layer.num_batches_tracked = None


@contextmanager
def batch_statistics_only(*modules: nn.Module) -> Generator[None]:
    """Context in which forwards in train mode normalize by their batch and leave the running statistics alone."""
    layers = [layer for module in modules for layer in batch_norms(module)]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@contextmanager
def running_statistics_kept(module: nn.Module) -> Generator[None]:
    """Context in which forwards in train mode write running statistics that take nothing from their batch.

    By a momentum of 0, so that the kernels of a forward stay those of training."""
    layers = batch_norms(module)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
