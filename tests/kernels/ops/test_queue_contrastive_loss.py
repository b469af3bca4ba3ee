"""Tests of queue_contrastive_loss and its queue. Tests that nt_xent shares are in test_view_losses.py."""

import pytest
import torch
from layouts import lay_out
from tolerance import gradient_floor, loss_floor
from torch import Tensor
from view_losses import DTYPES, K, loss_of, queue_of, sides_of, with_gradients

from mnclglf_kernels import queue_contrastive_loss


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("queue_dtype", DTYPES[1:], ids=str)
def test_a_queue_of_any_dtype(dtype, queue_dtype, backend):
    sides, loss = sides_of((9, 21), dtype), loss_of("queue", queue_of(21, queue_dtype))
    value, *gradients = with_gradients(loss.ours, sides, 0.2, backend=backend)
    truth, *true_gradients = with_gradients(loss.equation, (sides[0].double(), sides[1].double()), 0.2)
    assert value.item() == pytest.approx(truth.item(), abs=loss_floor(0.2, K + 1, dtype))
    for rows, gradient, expected in zip(sides, gradients, true_gradients, strict=True):
        error = (gradient.double() - expected).abs().amax(dim=1)
        assert (error <= gradient_floor(rows, 9, 0.2, 1.0, expected)).all()


def test_the_queue_gets_no_gradient(backend):
    queue, (queries, keys) = queue_of(21, torch.float32).requires_grad_(), sides_of((9, 21))
    queue_contrastive_loss(queries.requires_grad_(), keys, queue, 0.5, backend=backend).backward()
    assert queue.grad is None
    assert queries.grad is not None
    assert not queue_contrastive_loss(queries.detach(), keys, queue, 0.5, backend=backend).requires_grad


def test_chunks_of_the_queue_are_one_sum(monkeypatch):
    queue, sides = queue_of(21, torch.float32), sides_of((9, 21))
    ours = loss_of("queue", queue).ours
    expected = with_gradients(ours, sides, 0.2, backend="torch")
    monkeypatch.setattr("mnclglf_kernels.ops.queue_contrastive_loss.CHUNK", 10)
    for result, reference in zip(with_gradients(ours, sides, 0.2, backend="torch"), expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-7)  # fp32 sums in another order


def test_no_backend_keeps_the_logits_for_backward(backend):
    """Saved tensors have at most N x D elements, not N x K; the queue itself is in memory anyway."""
    queries, keys = (rows.requires_grad_() for rows in sides_of((9, 5)))
    queue, kept = queue_of(5, torch.float32, 500), []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        queue_contrastive_loss(queries, keys, queue, 0.5, backend=backend)
    others = [x for x in kept if x.untyped_storage().data_ptr() != queue.untyped_storage().data_ptr()]
    assert kept
    assert max(x.numel() for x in others) <= 9 * 5


def test_triton_names_a_queue_that_is_not_dense():
    queue = lay_out(queue_of(4, torch.float32), "every second row")
    with pytest.raises(ValueError, match=r"strides \(8, 1\).*contiguous"):
        queue_contrastive_loss(*sides_of((3, 4)), queue, 0.5, backend="triton")


@pytest.mark.parametrize(
    ("queue", "error", "named"),
    [
        (torch.randn(0, 4), ValueError, "at least one row"),
        (torch.randn(6, 5), ValueError, "5"),
        (torch.randn(6), ValueError, r"\(6,\)"),
        (torch.ones(6, 4, dtype=torch.int64), TypeError, "queue.*int64"),
    ],
    ids=["empty", "width", "one dimension", "dtype"],
)
def test_a_wrong_queue_is_named(queue, error, named, backend):
    with pytest.raises(error, match=named):
        queue_contrastive_loss(*sides_of((3, 4)), queue, 1.0, backend=backend)
