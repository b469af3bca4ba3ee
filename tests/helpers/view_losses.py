"""Two losses that contrast the embeddings [N, D] of two views, their equations as loops, and a check of a loss."""

from collections.abc import Callable
from typing import NamedTuple

import method_oracles
import pytest
import torch
from tolerance import assert_as_accurate_as_plain, gradient_floor, loss_floor
from torch import Tensor
from torch.nn import functional as F

from mnclglf_kernels import nt_xent, queue_contrastive_loss

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
K = 37  # rows of the queue


class Loss(NamedTuple):
    """Functions of two sides and a temperature: ours, PyTorch in the dtype of its input, and the equation as loops."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    equation: Callable[..., Tensor]


def queue_of(width: int, dtype: torch.dtype, size: int = K) -> Tensor:
    """Returns rows of unit norm, the same ones in each call."""
    rows = torch.randn(size, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return F.normalize(rows).to(dtype)


def loss_of(name: str, queue: Tensor) -> Loss:
    if name == "nt_xent":
        return Loss(nt_xent, method_oracles.nt_xent_as_published, method_oracles.nt_xent)
    return Loss(
        lambda q, k, temperature, **how: queue_contrastive_loss(q, k, queue, temperature, **how),
        lambda q, k, temperature: method_oracles.queue_loss_as_published(q, k, queue.to(q.dtype), temperature),
        lambda q, k, temperature: method_oracles.queue_contrastive_loss(q, k, queue.to(q.dtype), temperature),
    )


def with_gradients(
    function: Callable[..., Tensor], sides: tuple[Tensor, Tensor], temperature: float, upstream=1.0, **how
):
    """Returns (loss, gradient of the first side, of the second) of detached copies, with `upstream` as dL/dloss."""
    leaves = [rows.detach().clone().requires_grad_() for rows in sides]
    loss = function(*leaves, temperature, **how)
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))


def check(
    name: str, sides: tuple[Tensor, Tensor], temperature: float, backend: str, upstream: float = 1.0, size: int = K
) -> None:
    """Checks a loss and both gradients against loops in fp64 and plain PyTorch in the dtype of the input."""
    count, dtype = len(sides[0]), sides[0].dtype
    ours, plain, equation = loss_of(name, queue_of(sides[0].shape[1], dtype, size))
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(TypeError, match="float64"):
            ours(*sides, temperature, backend=backend)
        return
    loss, *gradients = with_gradients(ours, sides, temperature, upstream, backend=backend)
    plain_loss, *plain_gradients = with_gradients(plain, sides, temperature, upstream)
    doubled = (sides[0].double(), sides[1].double())
    true_loss, *true_gradients = with_gradients(equation, doubled, temperature, upstream)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ()
    candidates = 2 * count if name == "nt_xent" else size + 1
    floor = loss_floor(temperature, candidates, dtype)
    assert_as_accurate_as_plain(loss, plain_loss, true_loss, floor, what="loss")
    for rows, gradient, plain_gradient, truth in zip(sides, gradients, plain_gradients, true_gradients, strict=True):
        assert gradient.dtype == dtype
        # Of the mean over 2N rows, each is twice in a term: as itself and as a candidate. In the queue's over N, once.
        floor = gradient_floor(rows, count, temperature, upstream, truth)
        assert_as_accurate_as_plain(gradient, plain_gradient, truth, floor, what="gradient")


def sides_of(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Returns random rows of different norms, far from 1."""
    first, second = (torch.randn(shape) * torch.rand(shape[0], 1).add(0.1) * 5 for _ in range(2))
    return first.to(dtype), second.to(dtype)
