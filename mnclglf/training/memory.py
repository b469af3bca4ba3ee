"""Estimate of the GPU memory that a step needs, made without a GPU, and of the largest batch that fits.

A forward on the meta device shows which tensors autograd saves. A step needs these, the weights with their optimizer
state, and short-lived tensors. The allocator's rounding and cuDNN's workspaces are not included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mnclglf.config import RunConfig
from mnclglf.training.roofline import inputs_on_meta, on_meta
from mnclglf.training.step import checkpoint_activations

RESERVED = 2**30  # bytes of a GPU that tensors cannot have: the CUDA context, workspaces


class Memory(NamedTuple):
    """Memory of a step in bytes."""

    kept: int  # from step to step: weights, SGD's momentum, queue
    casts: int  # of the weights, in autocast's dtype
    gradients: int  # in fp32, and before that in autocast's dtype
    activations: int  # saved for backward
    passing: int  # short-lived activations, which autograd does not save

    @property
    def for_step(self) -> int:
        """Returns the bytes beyond `kept`. Backward frees activations while it makes gradients, hence the maximum."""
        return self.casts + max(self.activations + self.passing, self.gradients)

    @property
    def total(self) -> int:
        return self.kept + self.for_step


def step_memory(config: RunConfig, images: int, side: int, dtype: torch.dtype) -> Memory:
    """Returns the memory of a step on so many images in eager mode; torch.compile saves fewer activations."""
    method = on_meta(config, dtype)
    weights = sum(p.numel() for p in method.parameters())
    trained = sum(p.numel() for p in method.trained_parameters())
    buffers = sum(buffer.nbytes for buffer in method.buffers())
    kept = 4 * (weights + trained) + buffers
    narrow = 0 if dtype == torch.float32 else dtype.itemsize
    if config.engine.activation_checkpointing:
        checkpoint_activations(method)
    own = {storage_of(tensor) for tensor in (*method.parameters(), *method.buffers())}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if storage_of(tensor) not in own:
            saved[storage_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # The losses keep the graph alive until all is counted: the address of a freed storage could come twice.
        losses = method(*inputs_on_meta(method, images, side, dtype))
    del losses
    largest = max(saved.values(), default=0)
    return Memory(
        kept=kept,
        casts=narrow * weights,
        gradients=(4 + narrow) * trained,
        activations=sum(saved.values()),
        # A gradient that comes, one that goes, and a workspace. With checkpoints also what a block computes again: the
        # results of its two convolutions and of its two batch norms, for all views of the batch.
        passing=(7 if config.engine.activation_checkpointing else 3) * largest,
    )


def storage_of(tensor: Tensor) -> int:
    """Returns an identifier of the tensor's storage. On the meta device data_ptr() cannot tell: it is 0 for all."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def largest_batch(config: RunConfig, side: int, dtype: torch.dtype, memory_bytes: int) -> int:
    """Returns the largest batch for a GPU of this much memory; 0 if not even two images fit."""
    # Memory is linear in the batch: two estimates give the line.
    least, more = (step_memory(config, images, side, dtype) for images in (64, 128))
    first, second = (memory.activations + memory.passing for memory in (least, more))  # what grows
    an_image = (second - first) / 64
    available = memory_bytes - RESERVED - least.kept - least.casts
    fits = int((available - (first - 64 * an_image)) / an_image)
    return fits if fits >= 2 and least.gradients <= available else 0
