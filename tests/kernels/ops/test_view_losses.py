"""Tests of nt_xent and queue_contrastive_loss, which contrast two views' embeddings [N, D], against loops in fp64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, lay_out
from tolerance import ULPS_FP32, loss_floor, working_epsilon
from torch.nn import functional as F
from view_losses import DTYPES, K, check, loss_of, queue_of, sides_of, with_gradients

from mnclglf_kernels._triton import queue_contrastive_loss as queue_kernels
from mnclglf_kernels._triton.tiles import Tile

SHAPES = [(1, 1), (1, 5), (5, 1), (3, 255), (9, 63), (33, 65), (17, 96), (2, 2048)]  # (N, D)
NAMES = pytest.mark.parametrize("name", ["nt_xent", "queue"])
SIDES = pytest.mark.parametrize("side", [0, 1], ids=["first", "second"])


@NAMES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients(name, shape, dtype, backend):
    check(name, sides_of(shape, dtype), 1.0, backend)


@NAMES
@pytest.mark.parametrize("temperature", [0.01, 0.1, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatures(name, temperature, dtype, backend):
    check(name, sides_of((9, 33), dtype), temperature, backend)


@NAMES
@given(
    count=st.integers(1, 12),
    width=st.integers(1, 70),
    size=st.integers(1, 70),
    temperature=st.floats(0.05, 10),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape(name, count, width, size, temperature, dtype, seed, backend):
    torch.manual_seed(seed)
    check(name, sides_of((count, width), dtype), temperature, backend, size=size)


@NAMES
@pytest.mark.parametrize("upstream", [-3.75, 0.0, 2.0**12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_gradient_scales(name, upstream, dtype, backend):
    check(name, sides_of((9, 21), dtype), 0.5, backend, upstream=upstream)


@NAMES
@pytest.mark.parametrize("logits", [(16, 32, 16), (32, 16, 64)], ids=str)
@pytest.mark.parametrize("gradients", [(16, 32, 16), (32, 16, 32)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_several_tiles_and_slices(name, logits, gradients, dtype, monkeypatch):
    shapes = {"contrastive": logits, "nt_xent": logits, "gradient": gradients, "queue_sum": gradients}
    for module in ("nt_xent", "queue_contrastive_loss"):
        monkeypatch.setattr(
            f"mnclglf_kernels._triton.{module}.tile", lambda name, *_: Tile(*shapes[name], warps=4, stages=1)
        )
    monkeypatch.setattr("mnclglf_kernels._triton.contrastive_losses.MERGED", 16)
    monkeypatch.setattr(queue_kernels, "COEFFICIENTS", 21 * 35)  # the queue of 75 rows in slices of 32, 32 and 11
    check(name, sides_of((21, 43), dtype), 0.2, "triton", size=75)


@NAMES
def test_several_tiles_of_wide_rows(name, backend):
    check(name, sides_of((40, 160)), 0.2, backend, size=130)


@NAMES
def test_upstream_gradient_of_stride_zero(name, backend):
    sides = sides_of((9, 21))
    ours = loss_of(name, queue_of(21, torch.float32)).ours
    leaves = [rows.clone().requires_grad_() for rows in sides]
    ours(*leaves, 0.5, backend=backend).expand(4).sum().backward()
    _, *expected = with_gradients(ours, sides, 0.5, 4.0, backend=backend)
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=0)  # exact: 4 is a power of two


@NAMES
@SIDES
def test_gradient_on_one_side(name, side, backend):
    sides, ours = sides_of((9, 21)), loss_of(name, queue_of(21, torch.float32)).ours
    _, *both = with_gradients(ours, sides, 0.5, backend=backend)
    sides[side].requires_grad_()
    ours(*sides, 0.5, backend=backend).backward()
    # Skipping the other side may change which matmuls run but not what they compute: a few units in the last place.
    torch.testing.assert_close(sides[side].grad, both[side], rtol=1e-5, atol=1e-8)
    assert sides[1 - side].grad is None


@NAMES
def test_no_gradient_where_none_is_asked(name, backend):
    sides, ours = sides_of((5, 9)), loss_of(name, queue_of(9, torch.float32)).ours
    assert not ours(*sides, 1.0, backend=backend).requires_grad
    with torch.no_grad():
        assert not ours(sides[0].requires_grad_(), sides[1], 1.0, backend=backend).requires_grad


@NAMES
def test_triton_refuses_a_second_derivative(name):
    leaves = [rows.requires_grad_() for rows in sides_of((3, 5))]
    loss = loss_of(name, queue_of(5, torch.float32)).ours(*leaves, 0.7, backend="triton")
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"nt_xent_backward|queue_contrastive_loss_backward"):
        gradient.square().sum().backward()


@NAMES
def test_gradient_through_both_sides_of_one_tensor(name, backend):
    rows, loss = torch.randn(8, 12), loss_of(name, queue_of(12, torch.float32))
    ours, oracle = rows.clone().requires_grad_(), rows.double().requires_grad_()
    loss.ours(ours, ours, 0.3, backend=backend).backward()
    loss.equation(oracle, oracle, 0.3).backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), oracle.grad, rtol=1e-5, atol=1e-7)  # fp32, sums of 37 and 12 terms


@NAMES
def test_backward_twice_and_inputs_left_alone(name, backend):
    queue = queue_of(21, torch.float32)
    leaves = [rows.requires_grad_() for rows in sides_of((9, 21))]
    before = [x.detach().clone() for x in (*leaves, queue)]
    loss = loss_of(name, queue).ours(*leaves, 0.5, backend=backend)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for once, twice in zip(first, second, strict=True):
        assert torch.equal(once, twice)
    for x, kept in zip((*leaves, queue), before, strict=True):
        assert torch.equal(x, kept)


@NAMES
@pytest.mark.parametrize("shape", [(4, 3), (3, 5)], ids=str)
def test_gradcheck(name, shape):
    leaves, ours = (
        [rows.requires_grad_() for rows in sides_of(shape, torch.float64)],
        loss_of(name, queue_of(shape[1], torch.float64)).ours,
    )
    assert torch.autograd.gradcheck(lambda a, b: ours(a, b, 0.7, backend="torch"), leaves)


@NAMES
@pytest.mark.parametrize("layout", LAYOUTS)
@SIDES
def test_layouts(name, layout, side, backend):
    sides, ours = sides_of((7, 19)), loss_of(name, queue_of(19, torch.float32)).ours
    expected = with_gradients(ours, sides, 0.5, backend=backend)
    leaves = [lay_out(rows, layout if i == side else "contiguous").requires_grad_() for i, rows in enumerate(sides)]
    loss = ours(*leaves, 0.5, backend=backend)
    for result, reference in zip((loss.detach(), *torch.autograd.grad(loss, leaves)), expected, strict=True):
        # Other strides may select another matmul routine, which sums in another order.
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-7)


@NAMES
def test_expanded_rows(name, backend):
    check(name, (torch.randn(7, 19), torch.randn(1, 19).expand(7, 19)), 0.5, backend)


@NAMES
@SIDES
@pytest.mark.parametrize("row", ["zero", "tiny", "below the floor", "above the floor", "duplicate"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_special_rows(name, side, row, dtype, backend):
    sides = sides_of((7, 19), dtype)
    rows = sides[side]
    unit = rows[3] / rows[3].norm()
    rows[3] = {
        "zero": torch.zeros_like(unit),
        "tiny": unit * 1e-20,
        "below the floor": unit * 0.5e-12,
        "above the floor": unit * 1.5e-12,
        "duplicate": rows[2],
    }[row]
    check(name, sides, 0.5, backend)


@NAMES
@SIDES
def test_huge_rows(name, side, backend):
    sides = sides_of((7, 19))
    sides[side][3] *= 1e20  # the squared norm overflows; F.normalize then returns a zero row, the largest error
    check(name, sides, 0.5, backend)


@NAMES
@SIDES
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_shows_in_the_loss_and_spoils_the_gradients_that_see_it(name, side, value, backend):
    sides, loss = sides_of((7, 19)), loss_of(name, queue_of(19, torch.float32))
    _, *finite = with_gradients(loss.ours, sides, 0.5, backend=backend)
    sides[side][3, 2] = value
    total, *gradients = with_gradients(loss.ours, sides, 0.5, backend=backend)
    _, *plain = with_gradients(loss.plain, sides, 0.5)
    assert total.isnan()
    for gradient, expected, unspoilt in zip(gradients, plain, finite, strict=True):
        spoilt = expected.isnan().any(dim=1)  # a row sees all candidates; a query sees only its key and the queue
        assert spoilt.any()
        assert torch.equal(gradient.isnan().any(dim=1), spoilt)
        torch.testing.assert_close(gradient[~spoilt], unspoilt[~spoilt], rtol=1e-5, atol=1e-8)


@NAMES
@pytest.mark.parametrize("count", [1, 31, 33])
def test_uniform_embeddings_give_the_logarithm_of_the_candidates(name, count, backend):
    rows = torch.ones(count, 16)
    queue = F.normalize(torch.ones(65, 16))
    loss = loss_of(name, queue).ours(rows, 3 * rows, 0.01, backend=backend)
    candidates = 2 * count - 1 if name == "nt_xent" else 66
    # Every logit is 100. Tolerance: one unit in the last place of 100 and of the sum.
    assert loss.item() == pytest.approx(math.log(candidates), abs=100 * 2**-22)


@NAMES
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_logits_are_not_rounded_to_the_input_dtype(name, dtype, backend):
    width, temperature = 16384, 0.01
    signs = torch.ones(2, width, dtype=dtype)
    signs[1, 7] = -1  # cosine 1 - 2/16384: 1.0 in bf16 and in fp16
    ours = loss_of(name, signs[1:] / 128).ours
    others = 2 if name == "nt_xent" else 1
    expected = math.log1p(others * math.exp(-2 / width / temperature))
    sides = (signs, signs) if name == "nt_xent" else (signs[:1], signs[:1])
    # Norms of 128 are exact; the logits are near 100, where fp32 has a spacing of 2**-17.
    assert ours(*sides, temperature, backend=backend).item() == pytest.approx(expected, abs=4 * 2**-17)


@NAMES
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_rows_are_not_rounded_once_normalised(name, dtype, backend):
    sides, loss = sides_of((17, 33), dtype), loss_of(name, queue_of(33, dtype))
    truth = loss.equation(*(rows.double() for rows in sides), 0.05)
    # Tolerance: fp32 rounding of logits of up to 20 and of log 38. Rounding the rows would cost some 1e-3.
    expected = pytest.approx(truth.item(), abs=ULPS_FP32 * working_epsilon(dtype) * 24)
    assert loss.ours(*sides, 0.05, backend=backend).item() == expected


@NAMES
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradient_of_a_confident_row_survives(name, dtype, backend):
    # Logits 10.1 of the positive and 0 of all others: p - 1 is about -1e-4, which is 0 if p is rounded to bf16 or fp16
    # first. Each side has a part outside the span of the other, as the part parallel to a row has no gradient.
    second = torch.eye(2, 8, dtype=dtype)
    first, queue = second + second.roll(2, dims=1), torch.eye(8, dtype=dtype)[6:]
    loss = loss_of(name, queue)
    temperature, upstream = 0.07, 4096.0  # a loss scale: keeps the truth far above fp16's smallest normal number
    _, *gradients = with_gradients(loss.ours, (first, second), temperature, upstream, backend=backend)
    _, *truths = with_gradients(loss.equation, (first.double(), second.double()), temperature, upstream)
    for gradient, truth in zip(gradients, truths, strict=True):
        # fp32: 1 - p cancels to 8e-5 with an error of 6e-8. Other dtypes: rounding at the store.
        rtol = max(3e-3, torch.finfo(dtype).eps)
        torch.testing.assert_close(gradient.double(), truth, rtol=rtol, atol=1e-3 * truth.abs().max().item())


@NAMES
@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_confident_rows(name, temperature, backend):
    rows = torch.randn(16, 64)
    check(name, (rows, 2 * rows), temperature, backend)


@NAMES
def test_autocast_does_not_round_the_logits(name, backend):
    leaves = [rows.requires_grad_() for rows in sides_of((17, 33), torch.bfloat16)]
    ours = loss_of(name, queue_of(33, torch.bfloat16)).ours
    outside = ours(*leaves, 0.05, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ours(*leaves, 0.05, backend=backend)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    # Backward runs outside autocast, as PyTorch requires.
    gradients = (torch.autograd.grad(loss, leaves) for loss in (inside, outside))
    for result, reference in zip(*gradients, strict=True):
        assert torch.equal(result, reference)


@NAMES
def test_sides_of_two_dtypes(name, backend):
    sides = sides_of((9, 21))
    sides = (sides[0].half(), sides[1])
    loss = loss_of(name, queue_of(21, torch.float32))
    value, *gradients = with_gradients(loss.ours, sides, 0.5, backend=backend)
    truth = loss.equation(*(rows.double() for rows in sides), 0.5)
    assert [x.dtype for x in (value, *gradients)] == [torch.float32, torch.float16, torch.float32]
    assert value.item() == pytest.approx(truth.item(), abs=loss_floor(0.5, K, torch.float32))


@NAMES
@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ((3, 4), (2, 4), "3 rows.*2"),
        ((3, 5), (3, 4), "5.*4"),
        ((3, 4, 1), (3, 4), r"\(3, 4, 1\)"),
        ((3, 4), (4,), r"\(4,\)"),
        ((0, 4), (0, 4), "0 rows"),
    ],
    ids=["rows", "widths", "three dimensions", "one dimension", "no rows"],
)
def test_wrong_shapes_are_named(name, first, second, named, backend):
    with pytest.raises(ValueError, match=named):
        loss_of(name, torch.randn(6, 4)).ours(torch.randn(first), torch.randn(second), 1.0, backend=backend)


@NAMES
@pytest.mark.parametrize("temperature", [0.0, -0.5, math.nan])
def test_wrong_temperature_is_named(name, temperature, backend):
    rows = torch.randn(3, 4)
    with pytest.raises(ValueError, match=str(temperature)):
        loss_of(name, rows).ours(rows, rows, temperature, backend=backend)


@NAMES
@SIDES
def test_wrong_dtype_is_named(name, side, backend):
    rows = [torch.randn(3, 4), torch.randn(3, 4)]
    rows[side] = torch.ones(3, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"(first|second|queries|keys).*int64"):
        loss_of(name, torch.randn(3, 4)).ours(*rows, 1.0, backend=backend)
