"""nt_xent in Triton: the kernels of contrastive_losses, with the 2N rows of both views as targets and predictions.

The positive of a row is N rows further on. A row's own logit is masked. The gradient of a row adds the coefficients of
its row and of its column first, so one product serves both. Over several ranks it takes two: the rows of a rank are
queries, and all 2N are candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mnclglf_kernels._triton import launch
from mnclglf_kernels._triton.contrastive_losses import (
    Forward,
    Part,
    backward_launches,
    check_dense,
    empty_forward,
    forward_launches,
)
from mnclglf_kernels._triton.launch import Launch, architecture
from mnclglf_kernels._triton.tiles import ARCHITECTURES, SMALL, Tile, Tuning, register, tile

# sm_80 would spill with a depth of 32.
_FP32 = {arch: Tile(64, 64, 16 if arch == 80 else 32, 4, 2) for arch in ARCHITECTURES}
# The [2N, 2N] logits are few. At N 256, 64 x 64 tiles make 64 programs and 64 x 128 only 32, for 82 SMs.
register("nt_xent", half=(SMALL, SMALL, SMALL), fp32=(_FP32, _FP32, _FP32))


def nt_xent_tiles(rows: Tensor, arch: int) -> tuple[Tile, Tile]:
    """Returns the configurations (of the logits, of the gradient) for rows of this width and dtype."""
    logits, gradient = (tile(name, rows.dtype, rows.shape[1], arch) for name in ("nt_xent", "gradient"))
    return logits, gradient


def empty_nt_xent_forward(rows: Tensor, rank: int = 0, ranks: int = 1) -> Forward:
    return empty_forward([rows], [rows], Part(rank, ranks, len(rows) // 2))


def nt_xent_forward_launches(
    rows: Tensor, temperature: float, results: Forward, t: Tile, rank: int = 0, ranks: int = 1
) -> list[Launch]:
    """The two launches of the forward. `results` comes from empty_nt_xent_forward."""
    return forward_launches([rows], [rows], temperature, results, t, Part(rank, ranks, len(rows) // 2))


def nt_xent_backward_launches(
    rows: Tensor,
    temperature: float,
    results: Forward,
    upstream: Tensor,
    gradient: Tensor,
    t: Tile,
    gradient_tile: Tile,
    rank: int = 0,
    ranks: int = 1,
) -> list[Launch]:
    """The two launches of the backward. `upstream` is [1] fp32, and t must be the forward's."""
    given = ([rows], [rows], temperature, results, upstream, [], [gradient], t, gradient_tile)
    return backward_launches(*given, Part(rank, ranks, len(rows) // 2))


def launches(
    first: Tensor, second: Tensor, temperature: float, *, rank: int = 0, ranks: int = 1, arch: int
) -> list[Launch]:
    """The launches of one call and of its backward pass."""
    rows, part = torch.cat([first, second]), (rank, ranks)
    results = empty_nt_xent_forward(rows, *part)
    t, gradient_tile = nt_xent_tiles(rows, arch)
    shared = (rows, temperature, results)
    return [
        *nt_xent_forward_launches(*shared, t, *part),
        *nt_xent_backward_launches(*shared, results.losses, torch.empty_like(rows), t, gradient_tile, *part),
    ]


def tunings(first: Tensor, second: Tensor, temperature: float, *, rank: int = 0, ranks: int = 1) -> Iterator[Tuning]:
    """The forward launches, whose tile can be measured. contrastive_losses measures the gradient's tile."""
    rows, part = torch.cat([first, second]), (rank, ranks)
    results = empty_nt_xent_forward(rows, *part)
    yield Tuning("nt_xent", lambda t: nt_xent_forward_launches(rows, temperature, results, t, *part), list(results))


@torch.library.custom_op("mnclglf::nt_xent", mutates_args=())
def nt_xent(
    rows: Tensor, temperature: float, rank: int = 0, ranks: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the fields of Forward for one pair. Rows are dense [2N, D], view 1 above view 2."""
    check_dense([rows], [rows])
    results = empty_nt_xent_forward(rows, rank, ranks)
    t, _ = nt_xent_tiles(rows, architecture(rows))
    launch.run(nt_xent_forward_launches(rows, temperature, results, t, rank, ranks), rows.device)
    return results.losses, results.tops, results.log_sums, results.inverse_targets, results.inverse_predictions


@torch.library.custom_op("mnclglf::nt_xent_backward", mutates_args=())
def nt_xent_backward(
    upstream: Tensor,
    rows: Tensor,
    tops: Tensor,
    log_sums: Tensor,
    inverse_targets: Tensor,
    inverse_predictions: Tensor,
    temperature: float,
    rank: int = 0,
    ranks: int = 1,
) -> Tensor:
    """Returns the gradient of the rows, [2N, D]."""
    check_dense([rows], [rows])
    results = Forward(upstream, tops, log_sums, inverse_targets, inverse_predictions)
    gradient, tiles = torch.empty_like(rows), nt_xent_tiles(rows, architecture(rows))
    given = (rows, temperature, results, upstream, gradient, *tiles, rank, ranks)
    launch.run(nt_xent_backward_launches(*given), rows.device)
    return gradient


@nt_xent.register_fake
def _(rows: Tensor, temperature: float, rank: int = 0, ranks: int = 1) -> tuple[Tensor, ...]:
    return tuple(empty_nt_xent_forward(rows, rank, ranks))


@nt_xent_backward.register_fake
def _(upstream: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(rows)


def _setup(ctx: Any, inputs: tuple[Tensor, float, int, int], output: tuple[Tensor, ...]) -> None:
    rows, ctx.temperature, ctx.rank, ctx.ranks = inputs
    ctx.save_for_backward(rows, *output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor, None, None, None]:
    gradient = nt_xent_backward(upstream.contiguous(), *ctx.saved_tensors, ctx.temperature, ctx.rank, ctx.ranks)
    return gradient, None, None, None


nt_xent.register_autograd(_gradient, setup_context=_setup)
