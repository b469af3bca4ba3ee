"""Tests of contrastive_loss against the loops of oracles.contrastive_loss in fp64, forward and backward."""

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, lay_out
from tolerance import ULPS_FP32, assert_as_accurate_as_plain, gradient_floor, loss_floor, working_epsilon
from torch import Tensor
from torch.nn import functional as F

from mnclglf_kernels import contrastive_loss

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # (S, N, D): S need not be a C(4, k)
    (1, 1, 1),
    (1, 1, 5),
    (6, 1, 63),
    (1, 63, 65),
    (6, 65, 7),
    (4, 16, 123),
    (2, 123, 96),
    (3, 5, 255),
    (1, 3, 2048),
]


def plain_contrastive_loss(targets: Tensor, predictions: Tensor, temperature: float) -> Tensor:
    """Computes Algorithm 1's L in vectorized PyTorch, entirely in the dtype of its input."""
    predictions = F.normalize(predictions, dim=1)
    labels = torch.arange(len(predictions))
    splits = F.normalize(targets, dim=1).split(len(predictions))
    losses = (F.cross_entropy(split @ predictions.t() / temperature, labels) for split in splits)
    return sum(losses, torch.zeros((), dtype=targets.dtype)) / len(splits)


def with_gradients(function, targets: Tensor, predictions: Tensor, temperature: float, upstream: float, **settings):
    """Returns (loss, gradient of targets, gradient of predictions) of detached copies, with `upstream` as dL/dloss."""
    targets, predictions = (x.detach().clone().requires_grad_() for x in (targets, predictions))
    loss = function(targets, predictions, temperature, **settings)
    gradients = torch.autograd.grad(loss, (targets, predictions), torch.full_like(loss, upstream))
    return loss.detach(), *gradients


def check(targets: Tensor, predictions: Tensor, temperature: float, backend: str, upstream: float = 1.0) -> None:
    """Compares loss and both gradients with the fp64 loops and with plain PyTorch in the dtype of the input."""
    if backend == "triton" and torch.float64 in (targets.dtype, predictions.dtype):
        with pytest.raises(TypeError, match="float64"):
            contrastive_loss(targets, predictions, temperature, backend=backend)
        return
    arguments = (targets, predictions, temperature, upstream)
    loss, *gradients = with_gradients(contrastive_loss, *arguments, backend=backend)
    plain_loss, *plain_gradients = with_gradients(plain_contrastive_loss, *arguments)
    true_loss, *true_gradients = with_gradients(
        oracles.contrastive_loss, targets.double(), predictions.double(), temperature, upstream
    )
    assert loss.dtype == (torch.float64 if targets.dtype == torch.float64 else torch.float32)
    assert loss.shape == ()
    floor = loss_floor(temperature, len(predictions), targets.dtype)
    assert_as_accurate_as_plain(loss, plain_loss, true_loss, floor, what="loss")
    sides = (("targets", targets, len(targets)), ("predictions", predictions, len(predictions)))
    for (name, rows, terms), gradient, plain, truth in zip(
        sides, gradients, plain_gradients, true_gradients, strict=True
    ):
        assert gradient.dtype == rows.dtype
        floor = gradient_floor(rows, terms, temperature, upstream, truth)
        assert_as_accurate_as_plain(gradient, plain, truth, floor, what=f"gradient of {name}")


def rows_of(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns random targets [S*N, D] and predictions [N, D], with norms far from 1 that differ between rows."""
    subsets, images, width = shape
    targets = torch.randn(subsets * images, width) * torch.rand(subsets * images, 1).add(0.1) * 5
    predictions = torch.randn(images, width) * torch.rand(images, 1).add(0.1) * 5
    return targets.to(dtype), predictions.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients(shape, dtype, backend):
    check(*rows_of(shape, dtype), 1.0, backend)


def test_more_rows_than_a_step_of_triton_s_merge_takes(backend):
    check(*rows_of((5, 255, 3), torch.float32), 1.0, backend)  # 1275 rows, 1024 at a time


@pytest.mark.parametrize("temperature", [0.01, 0.1, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatures(temperature, dtype, backend):
    check(*rows_of((3, 17, 33), dtype), temperature, backend)


@given(
    subsets=st.integers(1, 6),
    images=st.integers(1, 70),
    width=st.integers(1, 70),
    temperature=st.floats(0.05, 10),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape(subsets, images, width, temperature, dtype, seed, backend):
    torch.manual_seed(seed)
    check(*rows_of((subsets, images, width), dtype), temperature, backend)


@pytest.mark.parametrize("upstream", [-3.75, 0.0, 2.0**12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_gradient_scales(upstream, dtype, backend):
    check(*rows_of((2, 9, 21), dtype), 0.5, backend, upstream=upstream)


@pytest.mark.parametrize("images", [65, 130])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_several_tiles_of_wide_rows(images, dtype, backend):
    check(*rows_of((2, images, 160), dtype), 0.2, backend)  # tiles of up to 128 columns, with a depth of 32 or 16


def test_upstream_gradient_of_stride_zero(backend):
    targets, predictions = (rows.requires_grad_() for rows in rows_of((2, 9, 21), torch.float32))
    contrastive_loss(targets, predictions, 0.5, backend=backend).expand(4).sum().backward()
    expected = with_gradients(contrastive_loss, targets, predictions, 0.5, 4.0, backend=backend)
    torch.testing.assert_close(targets.grad, expected[1], rtol=0, atol=0)  # exact: 4 is a power of two
    torch.testing.assert_close(predictions.grad, expected[2], rtol=0, atol=0)


@pytest.mark.parametrize("side", ["targets", "predictions"])
def test_gradient_on_one_side(side, backend):
    targets, predictions = rows_of((6, 9, 21), torch.float32)
    both = with_gradients(contrastive_loss, targets, predictions, 0.5, 1.0, backend=backend)
    learner = targets if side == "targets" else predictions
    learner.requires_grad_()
    loss = contrastive_loss(targets, predictions, 0.5, backend=backend)
    loss.backward()
    expected = both[1] if side == "targets" else both[2]
    # Skipping the other side may change which matmuls run but not what they compute: a few units in the last place.
    torch.testing.assert_close(learner.grad, expected, rtol=1e-5, atol=1e-8)
    assert (predictions if side == "targets" else targets).grad is None


def test_no_gradient_where_none_is_asked(backend):
    targets, predictions = rows_of((2, 5, 9), torch.float32)
    assert not contrastive_loss(targets, predictions, 1.0, backend=backend).requires_grad
    with torch.no_grad():
        assert not contrastive_loss(targets.requires_grad_(), predictions, 1.0, backend=backend).requires_grad


def test_a_second_derivative_is_refused(backend):
    targets, predictions = (rows.requires_grad_() for rows in rows_of((1, 3, 5), torch.float64))
    if backend == "torch":
        assert torch.autograd.gradgradcheck(lambda h, p: contrastive_loss(h, p, 0.7), (targets, predictions))
        return
    targets, predictions = (rows.detach().float().requires_grad_() for rows in (targets, predictions))
    loss = contrastive_loss(targets, predictions, 0.7, backend=backend)
    (gradient,) = torch.autograd.grad(loss, predictions, create_graph=True)
    with pytest.raises(RuntimeError, match="contrastive_losses_backward"):
        gradient.square().sum().backward()


def test_gradient_through_both_sides_of_one_tensor(backend):
    rows = torch.randn(8, 12)
    ours, oracle = rows.clone().requires_grad_(), rows.double().requires_grad_()
    contrastive_loss(ours, ours, 0.3, backend=backend).backward()
    oracles.contrastive_loss(oracle, oracle, 0.3).backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), oracle.grad, rtol=1e-5, atol=1e-7)  # fp32, sums of 8 and 12 terms


def test_backward_twice(backend):
    targets, predictions = (rows.requires_grad_() for rows in rows_of((6, 9, 21), torch.float32))
    loss = contrastive_loss(targets, predictions, 0.5, backend=backend)
    first = torch.autograd.grad(loss, (targets, predictions), retain_graph=True)
    second = torch.autograd.grad(loss, (targets, predictions))
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_left_alone(dtype, backend):
    targets, predictions = rows_of((6, 9, 21), dtype)
    before = targets.clone(), predictions.clone()
    upstream = torch.tensor(1.5)
    leaves = targets.requires_grad_(), predictions.requires_grad_()
    contrastive_loss(*leaves, 0.5, backend=backend).backward(upstream)
    assert torch.equal(targets, before[0])
    assert torch.equal(predictions, before[1])
    assert upstream.item() == 1.5


@pytest.mark.parametrize("shape", [(1, 4, 3), (6, 3, 5)], ids=str)
def test_gradcheck(shape):
    leaves = [rows.requires_grad_() for rows in rows_of(shape, torch.float64)]
    assert torch.autograd.gradcheck(lambda h, p: contrastive_loss(h, p, 0.7, backend="torch"), leaves)


@pytest.mark.parametrize("target_layout", LAYOUTS)
@pytest.mark.parametrize("prediction_layout", LAYOUTS)
def test_layouts(target_layout, prediction_layout, backend):
    targets, predictions = rows_of((2, 7, 19), torch.float32)
    expected = with_gradients(contrastive_loss, targets, predictions, 0.5, 1.0, backend=backend)
    leaves = lay_out(targets, target_layout).requires_grad_(), lay_out(predictions, prediction_layout).requires_grad_()
    loss = contrastive_loss(*leaves, 0.5, backend=backend)
    actual = loss.detach(), *torch.autograd.grad(loss, leaves)
    for result, reference in zip(actual, expected, strict=True):
        # Other strides may select another matmul routine, which sums in another order.
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-7)


def test_expanded_rows(backend):
    predictions = torch.randn(7, 19)
    targets = torch.randn(1, 19).expand(14, 19)
    check(targets, predictions, 0.5, backend)


@pytest.mark.parametrize("side", ["targets", "predictions", "both"])
@pytest.mark.parametrize("row", ["zero", "tiny", "below the floor", "above the floor", "duplicate"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_special_rows(side, row, dtype, backend):
    targets, predictions = rows_of((2, 7, 19), dtype)
    for rows in {"targets": [targets], "predictions": [predictions], "both": [targets, predictions]}[side]:
        unit = rows[3] / rows[3].norm()
        rows[3] = {
            "zero": torch.zeros_like(unit),
            "tiny": unit * 1e-20,
            "below the floor": unit * 0.5e-12,
            "above the floor": unit * 1.5e-12,
            "duplicate": rows[2],
        }[row]
    check(targets, predictions, 0.5, backend)


@pytest.mark.parametrize("side", ["targets", "predictions"])
def test_huge_rows(side, backend):
    targets, predictions = rows_of((2, 7, 19), torch.float32)
    rows = targets if side == "targets" else predictions
    rows[3] *= 1e20  # the squared norm overflows; F.normalize then returns a zero row, the largest error allowed
    check(targets, predictions, 0.5, backend)


@pytest.mark.parametrize("side", ["targets", "predictions"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_shows_in_the_loss(side, value, backend):
    targets, predictions = rows_of((2, 7, 19), torch.float32)
    (targets if side == "targets" else predictions)[3, 2] = value
    assert torch.isnan(contrastive_loss(targets, predictions, 0.5, backend=backend))


@pytest.mark.parametrize("side", ["targets", "predictions"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_spoils_the_gradients_that_see_it_and_no_other(side, value, backend):
    targets, predictions = rows_of((2, 7, 19), torch.float32)
    _, *finite = with_gradients(contrastive_loss, targets, predictions, 0.5, 1.0, backend=backend)
    (targets if side == "targets" else predictions)[3, 2] = value
    _, *gradients = with_gradients(contrastive_loss, targets, predictions, 0.5, 1.0, backend=backend)
    _, *plain = with_gradients(plain_contrastive_loss, targets, predictions, 0.5, 1.0)
    for gradient, expected, unspoilt in zip(gradients, plain, finite, strict=True):
        spoilt = expected.isnan().any(dim=1)  # all rows; if the row is a target, of the targets only it
        assert torch.equal(gradient.isnan().any(dim=1), spoilt)
        # Next to a row of NaN a matmul may sum in another order: a few units in the last place.
        torch.testing.assert_close(gradient[~spoilt], unspoilt[~spoilt], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("images", [1, 63, 65])
def test_uniform_embeddings_give_log_n(images, backend):
    rows = torch.ones(images, 16)
    loss = contrastive_loss(rows.repeat(6, 1), rows, 0.01, backend=backend)
    # Every logit is 100. Tolerance: one unit in the last place of 100 and of the sum.
    assert loss.item() == pytest.approx(math.log(images), abs=100 * 2**-22)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_are_not_rounded_to_the_input_dtype(dtype, backend):
    width, temperature = 16384, 0.01
    signs = torch.ones(2, width, dtype=dtype)
    signs[1, 7] = -1  # cosine 1 - 2/16384: 1.0 in bf16 and in fp16
    gap = 2 / width / temperature
    expected = math.log1p(math.exp(-gap))
    loss = contrastive_loss(signs, signs, temperature, backend=backend)
    # Norms of 128 are exact; the two logits are near 100, where fp32 has a spacing of 2**-17.
    assert loss.item() == pytest.approx(expected, abs=4 * 2**-17)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_are_not_rounded_once_normalised(dtype, backend):
    targets, predictions = rows_of((2, 17, 33), dtype)
    loss = contrastive_loss(targets, predictions, 0.05, backend=backend)
    truth = oracles.contrastive_loss(targets.double(), predictions.double(), 0.05)
    # Tolerance: fp32 rounding of logits of up to 20 and of log 17. Rounding the rows would cost some 1e-3.
    assert loss.item() == pytest.approx(truth.item(), abs=ULPS_FP32 * working_epsilon(dtype) * 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_a_confident_row_survives(dtype, backend):
    # Logits 10.1 and 0: p - 1 = -4.1e-5, which is 0 if p is rounded to bf16 or fp16 first. Each target has a part
    # outside the span of the predictions. The part parallel to a row has no gradient, so it would hide the error.
    predictions = torch.eye(2, 8, dtype=dtype)
    targets = predictions + predictions.roll(2, dims=1)
    upstream = 4096.0  # a loss scale: keeps the truth far above fp16's smallest normal number
    temperature = 0.07
    _, *gradients = with_gradients(contrastive_loss, targets, predictions, temperature, upstream, backend=backend)
    _, *truths = with_gradients(oracles.contrastive_loss, targets.double(), predictions.double(), temperature, upstream)
    for gradient, truth in zip(gradients, truths, strict=True):
        # fp32: 1 - p cancels to 4e-5 with an error of 6e-8, which is 0.15 %. Other dtypes: rounding at the store.
        rtol = max(3e-3, torch.finfo(dtype).eps)
        torch.testing.assert_close(gradient.double(), truth, rtol=rtol, atol=1e-3 * truth.abs().max().item())


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_confident_rows(temperature, backend):
    predictions = torch.randn(16, 64)
    check(predictions.repeat(3, 1), predictions, temperature, backend)


def test_autocast_does_not_round_the_logits(backend):
    leaves = [rows.requires_grad_() for rows in rows_of((2, 17, 33), torch.bfloat16)]
    outside = contrastive_loss(*leaves, temperature=0.05, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_loss(*leaves, temperature=0.05, backend=backend)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    # Backward runs outside autocast, as PyTorch requires.
    for result, reference in zip(
        torch.autograd.grad(inside, leaves), torch.autograd.grad(outside, leaves), strict=True
    ):
        assert torch.equal(result, reference)


def test_targets_of_another_dtype(backend):
    targets, predictions = rows_of((1, 9, 21), torch.bfloat16)
    wide = predictions.float()
    loss = contrastive_loss(targets, wide, 0.5, backend=backend)
    truth = oracles.contrastive_loss(targets.double(), wide.double(), 0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(truth.item(), abs=ULPS_FP32 * working_epsilon(torch.float32) * 5)


@pytest.mark.parametrize(
    ("targets", "predictions", "named"),
    [
        ((7, 4), (3, 4), "7"),
        ((2, 4), (3, 4), "2"),
        ((6, 5), (3, 4), "5"),
        ((6, 4, 1), (3, 4), r"3|\(6, 4, 1\)"),
        ((6, 4), (4,), r"1|\(4,\)"),
        ((0, 4), (0, 4), "0 target rows"),
        ((0, 4), (3, 4), "0 target rows"),
    ],
    ids=["rows not a multiple", "fewer rows", "widths", "three dimensions", "one dimension", "no rows", "no targets"],
)
def test_wrong_shapes_are_named(targets, predictions, named, backend):
    with pytest.raises(ValueError, match=named):
        contrastive_loss(torch.randn(targets), torch.randn(predictions), 1.0, backend=backend)


@pytest.mark.parametrize("temperature", [0.0, -0.5, math.nan])
def test_wrong_temperature_is_named(temperature, backend):
    rows = torch.randn(3, 4)
    with pytest.raises(ValueError, match=str(temperature)):
        contrastive_loss(rows, rows, temperature, backend=backend)


@pytest.mark.parametrize("wrong", [0, 1])
def test_wrong_dtype_is_named(wrong, backend):
    rows = [torch.randn(3, 4), torch.randn(3, 4)]
    rows[wrong] = torch.ones(3, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"(targets|predictions).*int64"):
        contrastive_loss(*rows, temperature=1.0, backend=backend)
