"""Tests of contrastive_losses: several pairs in one call give the same bits as one call per pair."""

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import gradient_floor, loss_floor
from torch import Tensor

from mnclglf_kernels import Backend, contrastive_loss, contrastive_losses
from mnclglf_kernels._triton.tiles import Tile

UPSTREAM = torch.tensor([1.0, -2.5, 0.0, 3e3, 0.125, 7.0])


def pair(subsets: int, images: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Returns targets [S*N, D] and predictions [N, D] that require gradients."""
    shapes = (subsets * images, width), (images, width)
    targets, predictions = ((5 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes)
    return targets, predictions


def check_pair_by_pair(pairs: list[tuple[Tensor, Tensor]], temperature: float, backend: Backend) -> None:
    """Compares losses and gradients with one call per pair, under one upstream gradient per pair."""
    losses = contrastive_losses(pairs, temperature, backend=backend)
    assert len(losses) == len(pairs)
    upstream = UPSTREAM[: len(pairs)]
    leaves = [rows for both in pairs for rows in both]
    gradients = torch.autograd.grad(torch.stack(losses) @ upstream, leaves)
    for i, both in enumerate(pairs):
        # A tile belongs to one pair and has its own order of sums, so other pairs in the launch change no bit.
        alone = contrastive_loss(*both, temperature, backend=backend)
        assert losses[i].dtype == alone.dtype == torch.float32
        assert torch.equal(losses[i], alone), f"loss {i}"
        for gradient, expected in zip(
            gradients[2 * i : 2 * i + 2], torch.autograd.grad(alone, both, upstream[i]), strict=True
        ):
            assert torch.equal(gradient, expected), f"gradient of pair {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("subsets", [(6, 6, 1, 1), (1, 2, 3, 4, 5, 6)], ids=str)
def test_pairs_of_several_s(subsets, dtype, backend):
    check_pair_by_pair([pair(s, 13, 21, dtype) for s in subsets], 0.3, backend)


@pytest.mark.parametrize("logits", [(16, 32, 16), (32, 16, 64)], ids=str)
@pytest.mark.parametrize("gradients", [(16, 32, 16), (32, 16, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_s_tiles_need_not_be_square(logits, gradients, dtype, monkeypatch):
    shapes = {"contrastive": logits, "gradient": gradients}
    monkeypatch.setattr(
        "mnclglf_kernels._triton.contrastive_losses.tile", lambda name, *_: Tile(*shapes[name], warps=4, stages=1)
    )
    monkeypatch.setattr("mnclglf_kernels._triton.contrastive_losses.MERGED", 16)
    pairs = [pair(subsets, 37, 43, dtype) for subsets in (2, 1, 3)]
    losses = contrastive_losses(pairs, 0.3, backend="triton")
    upstream = UPSTREAM[:3]
    leaves = [rows for both in pairs for rows in both]
    gradients = torch.autograd.grad(torch.stack(losses) @ upstream, leaves)
    doubled = [rows.detach().double().requires_grad_() for rows in leaves]
    truth = [oracles.contrastive_loss(*doubled[i : i + 2], tau=0.3) for i in (0, 2, 4)]
    true_gradients = torch.autograd.grad(torch.stack(truth) @ upstream.double(), doubled)
    for loss, true_loss in zip(losses, truth, strict=True):
        assert loss.item() == pytest.approx(true_loss.item(), abs=loss_floor(0.3, 37, dtype))
    for i, (gradient, true_gradient) in enumerate(zip(gradients, true_gradients, strict=True)):
        floor = gradient_floor(leaves[i], len(leaves[i]), 0.3, upstream[i // 2].item(), true_gradient)
        error = (gradient.double() - true_gradient).abs().amax(dim=1)
        assert (error <= floor).all(), f"gradient {i} is off by {error.max():.3e}"


def test_pairs_of_several_tiles(backend):
    check_pair_by_pair([pair(s, 65, 130) for s in (2, 1, 2)], 0.1, backend)


def test_pairs_of_several_shapes_and_dtypes(backend):
    half = torch.bfloat16
    pairs = [pair(2, 9, 21), pair(1, 9, 21, half), pair(2, 7, 21), pair(1, 9, 33), pair(3, 9, 21), pair(1, 9, 21, half)]
    check_pair_by_pair(pairs, 0.5, backend)


def test_one_pair_of_two_dtypes(backend):
    targets, predictions = pair(2, 9, 21)
    half = targets.detach().half().requires_grad_()
    first, second = contrastive_losses([(half, predictions), (targets, predictions)], 0.5, backend=backend)
    (first + second).backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.float16
    truth = oracles.contrastive_loss(half.double(), predictions.double(), 0.5)
    assert first.item() == pytest.approx(truth.item(), abs=loss_floor(0.5, 9, torch.float32))


@settings(max_examples=10)  # each example interprets some 50 launches
@given(data=st.data())
def test_any_pairs(data, backend):
    shapes = st.tuples(st.integers(1, 6), st.sampled_from([1, 11]), st.sampled_from([3, 17]))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16])
    drawn = data.draw(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=5), label="pairs")
    check_pair_by_pair([pair(*shape, dtype=dtype) for shape, dtype in drawn], 0.4, backend)


def test_gradients_of_a_tensor_in_several_pairs_add_up(backend):
    targets, predictions = pair(2, 9, 21)
    other_targets, _ = pair(1, 9, 21)
    pairs = [(targets, predictions), (other_targets, predictions), (predictions, predictions), (targets, other_targets)]
    losses = contrastive_losses(pairs, 0.5, backend=backend)
    upstream = UPSTREAM[: len(pairs)]
    leaves = targets, predictions, other_targets
    gradients = torch.autograd.grad(torch.stack(losses) @ upstream, leaves)
    doubled = [rows.detach().double().requires_grad_() for rows in leaves]
    twin = dict(zip(leaves, doubled, strict=True))
    truth = [oracles.contrastive_loss(twin[h], twin[p], 0.5) for h, p in pairs]
    expected = torch.autograd.grad(torch.stack(truth) @ upstream.double(), doubled)
    for gradient, true_gradient in zip(gradients, expected, strict=True):
        # fp32 sums of some 40 terms, each of up to 3000 / (9 * 0.5 * 10).
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (3,), (0, 3), (1, 3), (0, 2)], ids=str)
def test_gradients_of_some_tensors(asked, backend):
    tensors = [rows.detach() for both in (pair(2, 9, 21), pair(1, 9, 21)) for rows in both]

    def gradients(learners) -> list[Tensor | None]:
        leaves = [rows.clone().requires_grad_(i in learners) for i, rows in enumerate(tensors)]
        losses = contrastive_losses([(leaves[0], leaves[1]), (leaves[2], leaves[3])], 0.5, backend=backend)
        (torch.stack(losses) @ UPSTREAM[:2]).backward()
        return [leaf.grad for leaf in leaves]

    every = gradients(range(4))
    for i, gradient in enumerate(gradients(asked)):
        if i in asked:
            # PyTorch may select another matmul routine if a side needs no gradient: a few units in the last place.
            torch.testing.assert_close(gradient, every[i], rtol=1e-5, atol=1e-7)
        else:
            assert gradient is None


def test_a_loss_that_is_not_used_adds_no_gradient(backend):
    first, second = pair(2, 9, 21), pair(1, 9, 21)
    contrastive_losses([first, second], 0.5, backend=backend)[1].backward()
    expected = torch.autograd.grad(contrastive_loss(*second, 0.5, backend=backend), second)
    for rows, gradient in zip(second, expected, strict=True):
        assert rows.grad is not None
        assert torch.equal(rows.grad, gradient)
    for rows in first:
        assert rows.grad is None or not rows.grad.any()


def test_upstream_gradients_of_stride_zero(backend):
    pairs = [pair(2, 9, 21), pair(1, 9, 21)]
    torch.stack(contrastive_losses(pairs, 0.5, backend=backend)).sum().backward()
    for both in pairs:
        expected = torch.autograd.grad(contrastive_loss(*both, 0.5, backend=backend), both)
        for rows, gradient in zip(both, expected, strict=True):
            assert rows.grad is not None
            assert torch.equal(rows.grad, gradient)


def test_backward_twice_and_inputs_left_alone(backend):
    pairs = [pair(2, 9, 21), pair(1, 9, 21)]
    leaves = [rows for both in pairs for rows in both]
    before = [rows.detach().clone() for rows in leaves]
    total = torch.stack(contrastive_losses(pairs, 0.5, backend=backend)) @ UPSTREAM[:2]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    for rows, kept, once, twice in zip(leaves, before, first, second, strict=True):
        assert torch.equal(once, twice)
        assert torch.equal(rows, kept)


def test_no_pairs(backend):
    assert contrastive_losses([], 0.5, backend=backend) == []


def test_a_wrong_pair_among_right_ones_is_named(backend):
    with pytest.raises(ValueError, match="7 target rows"):
        contrastive_losses([pair(2, 9, 21), (torch.randn(7, 4), torch.randn(3, 4))], 0.5, backend=backend)
    with pytest.raises(TypeError, match="int64"):
        contrastive_losses(
            [pair(2, 9, 21), (torch.ones(3, 4, dtype=torch.int64), torch.randn(3, 4))], 0.5, backend=backend
        )


def test_triton_names_the_dtype_of_a_pair_it_cannot_multiply():
    pairs = [pair(2, 9, 21), pair(1, 9, 21, torch.float64)]
    with pytest.raises(TypeError, match="float64"):
        contrastive_losses(pairs, 0.5, backend="triton")
    assert [loss.dtype for loss in contrastive_losses(pairs, 0.5, backend="auto")] == [torch.float32, torch.float64]
