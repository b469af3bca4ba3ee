"""Messages between the processes of one training run: torch.distributed's default group, one rank per device.

Operators of torch.library, so that torch.compile and CUDA graphs take them as they are. Every rank must call them in
the same order, with tensors of the same shape and dtype. W is the number of ranks.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

messages: Counter[str] = Counter()
"""Number of messages of each kind that this process has taken part in; a replayed CUDA graph is not counted."""
message_bytes: Counter[str] = Counter()
"""Bytes that this process gave to them."""


@torch.library.custom_op("mnclglf::gather", mutates_args=())
def gather(x: Tensor) -> Tensor:
    """Returns the tensors of all ranks in the order of ranks, [W, *x.shape]; no gradient passes."""
    gathered = x.new_empty((dist.get_world_size(), *x.shape))
    _all_gather(gathered, x)
    return gathered


@torch.library.custom_op("mnclglf::gather_rows", mutates_args=())
def gather_rows(rows: Tensor) -> Tensor:
    """Returns the rows of all ranks in the order of ranks, [W * N, D] of [N, D].

    The gradient of a rank's rows is the sum of what all ranks' losses give them.
    """
    gathered = rows.new_empty((dist.get_world_size() * len(rows), *rows.shape[1:]))
    _all_gather(gathered, rows)
    return gathered


@torch.library.custom_op("mnclglf::sum_rows", mutates_args=())
def sum_rows(rows: Tensor) -> Tensor:
    """Returns this rank's part of the sum over ranks, [N, D] of [W * N, D]: the transpose of `gather_rows`."""
    part = rows.new_empty((len(rows) // dist.get_world_size(), *rows.shape[1:]))
    _reduce_scatter(part, rows)
    return part


@torch.library.custom_op("mnclglf::sum_over_ranks", mutates_args=())
def sum_over_ranks(x: Tensor) -> Tensor:
    """Returns the sum of the tensors of all ranks, the same bits on each; no gradient passes."""
    return sum_in_place(x.clone(memory_format=torch.contiguous_format))


@gather.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((dist.get_world_size(), *x.shape))


@gather_rows.register_fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty((dist.get_world_size() * rows.shape[0], *rows.shape[1:]))


@sum_rows.register_fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0] // dist.get_world_size(), *rows.shape[1:]))


@sum_over_ranks.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _no_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Keeps nothing for the backward pass."""


def _sum_gradient(ctx: Any, upstream: Tensor) -> Tensor:
    return sum_rows(upstream)


gather_rows.register_autograd(_sum_gradient, setup_context=_no_context)


def gather_together(*tensors: Tensor) -> list[Tensor]:
    """Returns the rows of all ranks of several tensors, [W * N, ...] of [N, ...] each, by one message.

    They may differ in dtype, and travel as bytes. No gradient passes.
    """
    rows = [x.detach().reshape(len(x), -1).contiguous().view(torch.uint8) for x in tensors]
    parts = gather_rows(torch.cat(rows, dim=1)).split([x.shape[1] for x in rows], dim=1)
    return [
        part.clone(memory_format=torch.contiguous_format).view(x.dtype).view(-1, *x.shape[1:])
        for part, x in zip(parts, tensors, strict=True)
    ]


def sum_in_place(x: Tensor) -> Tensor:
    """Replaces a contiguous tensor by its sum over all ranks, the same bits on each, and returns it."""
    _count("all_reduce", x)
    dist.all_reduce(x)
    return x


def _count(kind: str, x: Tensor) -> None:
    messages[kind] += 1
    message_bytes[kind] += x.numel() * x.itemsize


def _all_gather(gathered: Tensor, x: Tensor) -> None:
    _count("all_gather", x)
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # before torch 2.14
    getattr(dist, name)(gathered.view(-1), x.contiguous().view(-1))


def _reduce_scatter(part: Tensor, rows: Tensor) -> None:
    _count("reduce_scatter", rows)
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    getattr(dist, name)(part.view(-1), rows.contiguous().view(-1))
