"""Tests of batch_norm against loops over views and channels in fp64, forward and backward."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batch_norms import EPS, VARIANT_NAMES, VARIANTS, Case, case, check, oracle, plain, statistics, upstream_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import ULPS_FP32, assert_as_accurate_as_plain
from torch import Tensor

from mnclglf_kernels import batch_norm
from mnclglf_kernels._triton.batch_norm import PARTS, shape_of

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Views and shape: fewer rows than lanes, a row more than a tile, several tiles of channels, parts of several tiles.
SHAPES = [
    (2, (4, 1)),
    (1, (3, 5)),
    (2, (130, 63)),
    (3, (195, 123)),
    (4, (8, 65, 1, 1)),
    (1, (300, 64)),
    (2, (2, 1, 3, 7)),
    (3, (6, 64, 5, 3)),
    (1, (65, 3, 4, 4)),
    (2, (4, 123, 9, 8)),
]
MANY_PARTS = [(1, (18000, 1)), (1, (9000, 5)), (1, (6000, 64))]


@pytest.mark.parametrize(("residual", "relu"), VARIANTS, ids=VARIANT_NAMES)
@pytest.mark.parametrize(("views", "shape"), SHAPES, ids=str)
def test_batch_norm(views, shape, residual, relu, backend):
    check(case(shape, torch.float32, residual), views=views, relu=relu, backend=backend)


@pytest.mark.parametrize(("residual", "relu"), VARIANTS, ids=VARIANT_NAMES)
@pytest.mark.parametrize(("views", "shape"), [(3, (6, 64, 5, 3)), (2, (130, 63))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_batch_norm_in_every_dtype(dtype, views, shape, residual, relu, backend):
    """Checks half precision with its own weights for Triton; PyTorch rounds their gradients once per view."""
    vectors = torch.promote_types(dtype, torch.float32) if backend == "torch" else dtype
    check(case(shape, dtype, residual, vectors), views=views, relu=relu, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_batch_norm_of_half_precision_with_weights_in_fp32(dtype, backend):
    """As under autocast."""
    check(case((6, 5, 4, 3), dtype, vectors=torch.float32), views=3, relu=True, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("residual", "relu"), VARIANTS, ids=VARIANT_NAMES)
@pytest.mark.parametrize(("views", "shape"), [(3, (6, 64, 5, 3)), (2, (130, 63))], ids=str)
def test_batch_norm_adds_the_gradients_of_two_uses(views, shape, residual, relu, dtype, backend):
    drawn = case(shape, dtype, residual, torch.promote_types(dtype, torch.float32))
    check(drawn, views=views, relu=relu, backend=backend, fork=True)


@pytest.mark.parametrize(("residual", "relu"), VARIANTS, ids=VARIANT_NAMES)
@pytest.mark.parametrize("used", [0, 1])
def test_batch_norm_of_one_use_of_two(used, residual, relu, backend):
    drawn = case((6, 5, 3, 2), torch.float32, residual)
    one, two = drawn.leaves(), drawn.leaves()
    how: dict[str, Any] = dict(views=3, relu=relu, backend=backend)
    y = batch_norm(*one[:3], residual=one.residual, **how)
    other = batch_norm(*two[:3], residual=two.residual, fork=True, **how)[used]
    upstream = upstream_of(drawn)
    gradients = (torch.autograd.grad(out, side.tensors(), upstream) for out, side in ((y, one), (other, two)))
    for pair in zip(*gradients, strict=True):
        assert torch.equal(*pair)


def test_batch_norm_of_two_uses_needs_no_gradient(backend):
    x, weight, bias, _ = case((6, 3), torch.float32)
    for result in batch_norm(x, weight, bias, views=2, relu=True, fork=True, backend=backend):
        assert torch.equal(result, batch_norm(x, weight, bias, views=2, relu=True, backend=backend))
        assert not result.requires_grad


@pytest.mark.parametrize(("views", "shape"), MANY_PARTS, ids=str)
def test_batch_norm_of_more_parts_than_are_summed_at_a_time(views, shape):
    drawn = case(shape, torch.float32)
    assert shape_of(drawn.x, views)["P"] > PARTS
    check(drawn, views=views, relu=True, backend="triton")


@given(
    views=st.integers(1, 4),
    images=st.integers(1, 5),
    channels=st.integers(1, 6),
    sides=st.one_of(st.just(()), st.tuples(st.integers(1, 4), st.integers(1, 4))),
    residual=st.booleans(),
    relu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=20)  # four launches each
def test_batch_norm_any_shape(views, images, channels, sides, residual, relu, dtype, seed, backend):
    images += images * torch.Size(sides).numel() == 1  # a variance needs two values
    vectors = torch.promote_types(dtype, torch.float32)
    drawn = case((views * images, channels, *sides), dtype, residual, vectors, seed)
    check(drawn, views=views, relu=relu, backend=backend)


IMAGES = {
    "contiguous": lambda x: x.contiguous(),
    "sides": lambda x: x.transpose(2, 3),
    "images and channels": lambda x: x.transpose(0, 1),
    "every second channel": lambda x: x[:, ::2],
    "every second row": lambda x: x[:, :, ::2],
    "inner": lambda x: x[2:, 1:, 1:, 1:],
    "one image": lambda x: x[:1].expand(6, -1, -1, -1),
    "one channel": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}
ROWS = {
    "transposed": lambda x: x.t(),
    "every second column": lambda x: x[:, ::2],
    "every second row": lambda x: x[::2],
    "one row": lambda x: x[:1].expand(6, -1),
}


@pytest.mark.parametrize("of", ["x", "residual", "upstream"])
@pytest.mark.parametrize(
    ("view", "shape"),
    [(view, (6, 6, 4, 4)) for view in IMAGES.values()] + [(view, (12, 12)) for view in ROWS.values()],
    ids=[*IMAGES, *(f"{name} of rows" for name in ROWS)],
)
def test_batch_norm_strided(view, shape, of, backend):
    drawn = case(shape, torch.float64)
    strided = dict(x=view(drawn.x), residual=view(drawn.residual), upstream=view(upstream_of(drawn)))
    used = {name: x if name == of else x.contiguous() for name, x in strided.items()}
    upstream, channels = used.pop("upstream"), used["x"].shape[1]
    arguments = Case(used["x"], drawn.weight[:channels], drawn.bias[:channels], used["residual"])
    check(arguments, views=2, relu=False, backend=backend, upstream=upstream)


def test_batch_norm_strided_weights(backend):
    x, _, _, residual = case((6, 5), torch.float64)
    vectors = torch.randn(5, 2, dtype=torch.float64).unbind(1)
    check(Case(x, vectors[0], vectors[1], residual), views=2, relu=True, backend=backend)
    one = torch.ones(1, dtype=torch.float64).expand(5)
    check(Case(x, one, one, None), views=2, relu=True, backend=backend)


@pytest.mark.parametrize(("residual", "relu"), VARIANTS, ids=VARIANT_NAMES)
def test_batch_norm_upstream_gradient_of_stride_zero(residual, relu, backend):
    drawn, ones = case((6, 3, 4, 2), torch.float64, residual), torch.ones((), dtype=torch.float64)
    check(drawn, views=2, relu=relu, backend=backend, upstream=ones.expand(6, 3, 4, 2))


def test_batch_norm_gives_channels_last(backend):
    x, weight, bias, residual = case((6, 5, 4, 4), torch.float32)
    y = batch_norm(x, weight, bias, views=3, residual=residual, relu=True, backend=backend)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_batch_norm_holds_a_small_deviation_beside_a_large_mean(backend):
    """In fp32 a difference of two mean squares of 1e8 would hold nothing of a variance of 1e-4."""
    noise = torch.randn(3 * 500, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 100
    x, weight, bias = (1e4 + noise).float(), torch.ones(7), torch.zeros(7)
    running, theirs = torch.zeros(2, 7), torch.zeros(2, 7)
    y = batch_norm(x, weight, bias, *running, views=3, eps=EPS, momentum=1.0, backend=backend)
    F.batch_norm(x[-500:], *theirs, training=True, momentum=1.0)
    expected = plain(x, weight, bias, None, views=3, relu=False)
    truth = oracle(x.double(), weight.double(), bias.double(), None, views=3, relu=False)
    last = torch.finfo(torch.float32).eps
    assert_as_accurate_as_plain(y.t(), expected.t(), truth.t(), ULPS_FP32 * last * truth.abs().max(), what="y")
    mean, variance = statistics(x[-500:].double())
    last_places = (running[0] - mean).abs().max() / 2**-10
    assert last_places < (0.6 if backend == "triton" else 2)  # Triton: hardly more than one rounding
    # A mean is off by half its last place, whose square is added to the variance.
    floor = ULPS_FP32 * last * variance + (last * mean).square()
    assert_as_accurate_as_plain(running[1], theirs[1], variance * 500 / 499, floor, what="variance")


def test_batch_norm_of_an_outlier(backend):
    drawn = case((4, 3, 5, 5), torch.float32)
    drawn.x[1, 2, 3, 4] = 1e6
    check(drawn, views=2, relu=True, backend=backend)


def test_batch_norm_of_a_channel_without_variance(backend):
    drawn = case((6, 3, 4, 4), torch.float32)
    drawn.x[:, 1] = 0.1
    drawn.x[:2, 0] = 0
    check(drawn, views=3, relu=True, backend=backend)
    y = batch_norm(torch.full((4, 3), 2.5), drawn.weight, drawn.bias, backend=backend)
    # 1 / sqrt(eps) is 316: PyTorch rounds a mean of 2.5 times that, and the bias less it.
    torch.testing.assert_close(y, drawn.bias.expand(4, 3), rtol=0, atol=ULPS_FP32 * 2**-23 * 2.5 * 316)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("of", Case._fields)
def test_batch_norm_keeps_what_is_not_finite(of, value, backend):
    if of == "weight" and "inf" in value:
        return  # PyTorch's own batch norm gives NaN where it should be infinite
    drawn = case((6, 3, 4, 4), torch.float32)
    tensor = getattr(drawn, of)
    tensor[1 if tensor.dim() == 1 else (3, 1, 2, 3)] = float(value)
    ours, theirs = drawn.leaves(), drawn.leaves()
    running, expected_running = torch.ones(2, 3), torch.ones(2, 3)
    y = batch_norm(*ours[:3], *running, views=2, residual=ours.residual, relu=True, backend=backend)
    expected = plain(*theirs, views=2, relu=True)
    for part in drawn.x.chunk(2):
        F.batch_norm(part, *expected_running, training=True)
    outs = ((y, ours), (expected, theirs))
    results, true = ([x.detach(), *torch.autograd.grad(x, side.tensors(), upstream_of(drawn))] for x, side in outs)
    for pair in zip([*results, running], [*true, expected_running], strict=True):
        finite = [torch.where(x.isfinite(), x, torch.nan) for x in pair]  # a sum may take either of NaN and infinity
        torch.testing.assert_close(*finite, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_batch_norm_backward_masks_what_forward_did(backend):
    """Each bit of the bias's gradient, a sum of powers of two, says whether one element has passed."""
    powers = 2.0 ** torch.arange(22)[:, None].expand(22, 40)
    x, weight, bias, residual = case((22, 40), torch.float32).leaves()
    for other in (None, residual):
        y = batch_norm(x, weight, bias, residual=other, relu=True, backend=backend)
        (passed,) = torch.autograd.grad(y, bias, powers)
        assert torch.equal(passed, torch.where(y > 0, powers, 0).sum(0))


def test_batch_norm_gradient_of_the_residual_is_the_upstream_where_the_result_is_positive(backend):
    drawn = case((6, 5, 3, 3), torch.bfloat16).leaves()
    assert drawn.residual is not None
    upstream = upstream_of(drawn)
    for relu in (False, True):
        y = batch_norm(*drawn[:3], views=3, residual=drawn.residual, relu=relu, backend=backend)
        (gradient,) = torch.autograd.grad(y, drawn.residual, upstream)
        assert torch.equal(gradient, torch.where(y > 0, upstream, 0) if relu else upstream)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4, 5), (12, 65, 3, 1)], ids=str)
@pytest.mark.parametrize("views", [1, 2, 3, 4])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
def test_batch_norm_running_statistics_are_those_of_a_call_per_view(momentum, views, shape, dtype, backend):
    x, weight, bias, _ = case((shape[0] * views, *shape[1:]), dtype)
    running = torch.rand(2, shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = running.clone()
    batch_norm(x, weight, bias, *running, views=views, momentum=momentum, backend=backend)
    for part in x.chunk(views):
        F.batch_norm(part, *expected, training=True, momentum=momentum)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6  # some roundings of fp32
    torch.testing.assert_close(running, expected, rtol=tolerance, atol=tolerance)


def test_batch_norm_folds_as_asked(backend):
    """Views of another call may come between those of one call, so the caller can give the factors."""
    x, weight, bias, _ = case((8, 3), torch.float64)
    mean, variance = torch.rand(2, 3, dtype=torch.float64)
    before = mean.clone(), variance.clone()
    batch_norm(x, weight, bias, mean, variance, views=2, fold=[0.5, 0.2, 3], momentum=torch.nan, backend=backend)
    (first_mean, first), (second_mean, second) = (statistics(part) for part in x.chunk(2))
    torch.testing.assert_close(mean, 0.5 * before[0] + 0.2 * first_mean + 3 * second_mean, rtol=1e-12, atol=1e-12)
    unbiased = (0.2 * first + 3 * second) * 4 / 3
    torch.testing.assert_close(variance, 0.5 * before[1] + unbiased, rtol=1e-12, atol=1e-12)


def test_batch_norm_needs_no_running_statistics(backend):
    x, weight, bias, residual = case((6, 3, 2, 2), torch.float32)
    how: dict[str, Any] = dict(views=3, residual=residual, relu=True, backend=backend)
    expected = batch_norm(x, weight, bias, torch.zeros(3), torch.ones(3), **how)
    assert torch.equal(batch_norm(x, weight, bias, None, None, **how), expected)


def test_batch_norm_adds_eps_to_the_variance(backend):
    x = torch.tensor([[1.0], [3.0]])
    y = batch_norm(x, torch.ones(1), torch.zeros(1), eps=3.0, backend=backend)  # deviation sqrt(1 + 3)
    assert y.flatten().tolist() == [-0.5, 0.5]


def test_batch_norm_is_equal_from_launch_to_launch():
    drawn = case((6, 123, 9, 8), torch.bfloat16)
    found = []
    for _ in range(2):
        leaves, running = drawn.leaves(), torch.ones(2, 123)
        y = batch_norm(*leaves[:3], *running, views=2, residual=leaves.residual, relu=True, backend="triton")
        found.append([y, running, *torch.autograd.grad(y, leaves.tensors(), upstream_of(drawn))])
    for pair in zip(*found, strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize(("residual", "relu"), VARIANTS, ids=VARIANT_NAMES)
def test_batch_norm_backward_twice_and_inputs_left_alone(residual, relu, backend):
    drawn = case((6, 5, 3, 2), torch.float32, residual).leaves()
    leaves = drawn.tensors()
    before = [x.detach().clone() for x in leaves]
    y = batch_norm(*drawn[:3], views=2, residual=drawn.residual, relu=relu, backend=backend)
    upstream, result = upstream_of(drawn), y.detach().clone()
    kept = upstream.clone()
    first = torch.autograd.grad(y, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(y, leaves, upstream)
    for pair in zip((*first, *leaves, upstream, y), (*second, *before, kept, result), strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("learns", ["x", "weight", "bias", "residual"])
def test_batch_norm_gradient_of_one_argument_alone(learns, relu, backend):
    drawn = case((6, 5, 3, 2), torch.float32)
    every = drawn.leaves()
    alone = drawn._replace(**{learns: getattr(drawn.leaves(), learns)})
    gradients = []
    for side in (every, alone):
        y = batch_norm(*side[:3], views=2, residual=side.residual, relu=relu, backend=backend)
        gradients += torch.autograd.grad(y, getattr(side, learns), upstream_of(drawn))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_batch_norm_without_gradient(backend):
    drawn = case((4, 3), torch.float32)
    assert not batch_norm(*drawn[:3], residual=drawn.residual, relu=True, backend=backend).requires_grad
    leaves = drawn.leaves()
    with torch.no_grad():
        assert not batch_norm(*leaves[:3], residual=leaves.residual, relu=True, backend=backend).requires_grad


@pytest.mark.parametrize(("residual", "relu"), VARIANTS, ids=VARIANT_NAMES)
def test_batch_norm_gradcheck(residual, relu, backend):
    drawn = case((4, 1, 2, 1), torch.float64, residual).leaves()

    def call(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None = None) -> Tensor:
        return batch_norm(x, weight, bias, views=2, residual=other, relu=relu, eps=0.1, backend=backend)

    assert torch.autograd.gradcheck(call, drawn.tensors())


def test_batch_norm_refuses_a_second_derivative():
    leaves = case((4, 3), torch.float32).leaves()
    y = batch_norm(*leaves[:3], backend="triton")
    (gradient,) = torch.autograd.grad(y.square().sum(), leaves.x, create_graph=True)
    with pytest.raises(RuntimeError, match="_backward"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("fold", [None, [0.5, 0.2, 0.3]], ids=["momentum", "fold"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 3), (4, 3, 0, 2)], ids=str)
def test_batch_norm_of_no_elements(shape, fold, backend):
    x = torch.empty(shape, requires_grad=True)
    weight, bias, *running = (torch.ones(shape[1]) for _ in range(4))
    y = batch_norm(x, weight, bias, *running, views=2, fold=fold, residual=x, relu=True, backend=backend)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert torch.equal(torch.cat(running), torch.ones(2 * shape[1]))


FOUR_ROWS = dict(x=torch.zeros(4, 3), weight=torch.zeros(3), bias=torch.zeros(3))
RUNNING = dict(running_mean=torch.zeros(3), running_var=torch.zeros(3))


@pytest.mark.parametrize(
    ("wrong", "error", "named"),
    [
        (dict(x=torch.zeros(4, 3, 2)), ValueError, r"\(4, 3, 2\).*\[V \* N, C, H, W\]"),
        (dict(x=torch.zeros(4, 3).int()), TypeError, "x .*int32"),
        (dict(x=torch.zeros(4, 0), weight=torch.zeros(0), bias=torch.zeros(0)), ValueError, r"\(4, 0\).*channel"),
        (dict(views=3), ValueError, "views 3 .*4"),
        (dict(views=0), ValueError, "views 0 .*4"),
        (dict(views=4), ValueError, r"\(4, 3\).*one value"),
        (dict(weight=torch.zeros(4)), ValueError, r"weight .*\(4,\).*3 channels"),
        (dict(bias=torch.zeros(3, 1)), ValueError, r"bias .*\(3, 1\).*3 channels"),
        (dict(weight=torch.zeros(3).long()), TypeError, "weight .*int64"),
        (RUNNING | dict(running_var=torch.zeros(2)), ValueError, r"running_var .*\(2,\)"),
        (RUNNING | dict(running_var=None), ValueError, "running_var is None.*both"),
        (RUNNING | dict(running_mean=None), ValueError, "running_mean is None.*both"),
        (RUNNING | dict(running_mean=torch.zeros(3, 2)[:, 0]), ValueError, r"running_mean .*\(2,\).*contiguous"),
        (dict(residual=torch.zeros(4, 2)), ValueError, r"\(4, 2\).*\(4, 3\)"),
        (dict(residual=torch.zeros(4, 3).half()), ValueError, "float16.*float32"),
        (RUNNING | dict(views=2, fold=[1, 0]), ValueError, "2 factors.*2 views need 3"),
    ],
)
def test_batch_norm_names_what_is_wrong(wrong, error, named, backend):
    with pytest.raises(error, match=named):
        batch_norm(**FOUR_ROWS | wrong, backend=backend)


def test_batch_norm_sums_an_upstream_of_other_strides_in_full(backend):
    """torch's own sum is off by 0.1% in bf16 where the strides are not those of x."""
    x = torch.randn(32, 4, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    upstream = torch.randn(x.shape).bfloat16()
    (of_bias,) = torch.autograd.grad(batch_norm(x, weight, bias, views=2, backend=backend), bias, upstream)
    expected = upstream.double().sum(dim=(0, 2, 3))
    # Tolerance: fp32 sums of 32,768 numbers near 1, whose sums are below 1000 on the way.
    torch.testing.assert_close(of_bias.double(), expected, rtol=0, atol=1000 * 2**-20)
