"""Batch normalization as self-supervised training needs it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # the base of all of them


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
