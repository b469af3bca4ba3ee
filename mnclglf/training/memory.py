"""How much memory a step needs on a GPU, estimated without one, and the largest batch for a given amount.

A forward on the meta device tells which tensors autograd saves; a step needs these, the weights with what belongs to
them, and what is alive for a moment only. An allocator's rounding and cuDNN's workspaces come on top of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mnclglf.config import RunConfig
from mnclglf.training.roofline import inputs_on_meta, on_meta
from mnclglf.training.step import checkpoint_activations

RESERVED = 2**30  # bytes of a GPU that are not for tensors: the CUDA context, workspaces


class Memory(NamedTuple):
    """Bytes of a step."""

    kept: int  # from step to step: weights, SGD's momentum, queue
    casts: int  # of the weights, in autocast's dtype
    gradients: int  # in fp32, and before that in autocast's dtype
    activations: int  # saved for backward
    passing: int  # alive for a moment: activations that nothing saves

    @property
    def for_step(self) -> int:
        """Beyond what is kept. Backward frees activations while it makes gradients."""
        return self.casts + max(self.activations + self.passing, self.gradients)

    @property
    def total(self) -> int:
        return self.kept + self.for_step


def step_memory(config: RunConfig, images: int, side: int, dtype: torch.dtype) -> Memory:
    """What a step on so many images keeps alive at once, in eager mode; torch.compile saves less."""
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
        losses = method(*inputs_on_meta(method, images, side, dtype))  # alive until all are counted: no storage twice
    del losses
    largest = max(saved.values(), default=0)
    return Memory(
        kept=kept,
        casts=narrow * weights,
        gradients=(4 + narrow) * trained,
        activations=sum(saved.values()),
        passing=3 * largest,
    )


def storage_of(tensor: Tensor) -> int:
    """Which memory the tensor lies in, also where there is none: on the meta device all addresses are 0."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def largest_batch(config: RunConfig, side: int, dtype: torch.dtype, memory_bytes: int) -> int:
    """Images a step that fit into a GPU of this much memory; 0 where not even two do. Memory grows with the batch."""
    least, more = (step_memory(config, images, side, dtype) for images in (64, 128))
    first, second = (memory.activations + memory.passing for memory in (least, more))  # what grows
    an_image = (second - first) / 64
    available = memory_bytes - RESERVED - least.kept - least.casts
    fits = int((available - (first - 64 * an_image)) / an_image)
    return fits if fits >= 2 and least.gradients <= available else 0
