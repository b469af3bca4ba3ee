"""Tests of combine against the loops of the oracle, forward and backward."""

import itertools
import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, lay_out
from tolerance import assert_as_accurate_as_plain, combine_floor
from torch import Tensor

from mnclglf_kernels import combine

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def numbered(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns distinct elements, so that no two places can be confused."""
    return torch.arange(math.prod(shape)).reshape(shape).to(dtype)


def plain_combine(features: Tensor, k: int) -> Tensor:
    """Returns the mean of every k of the four patch features in vectorized PyTorch, in the dtype of its input."""
    patches = features.unflatten(0, (4, -1))
    return torch.cat([patches[list(subset)].mean(dim=0) for subset in itertools.combinations(range(4), k)])


@pytest.mark.parametrize(
    ("k", "images", "width"),
    [(k, *size) for k in (1, 2, 3, 4) for size in ((1, 1), (3, 63), (2, 2048))]
    + [(1, 63, 5), (2, 65, 65), (4, 123, 96), (3, 255, 123)],  # the oracle loops over images
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine(k, images, width, dtype, backend):
    features = torch.randn(4 * images, width).to(dtype)
    leaf, plain_leaf = features.clone().requires_grad_(), features.clone().requires_grad_()
    true_leaf = features.double().requires_grad_()
    combined, plain, truth = (
        combine(leaf, k, backend=backend),
        plain_combine(plain_leaf, k),
        oracles.combine(true_leaf, k),
    )
    assert combined.dtype == dtype
    assert_as_accurate_as_plain(combined, plain, truth, combine_floor(features, truth.detach()), what="combine")
    upstream = torch.randn(truth.shape).to(dtype)
    (gradient,) = torch.autograd.grad(combined, leaf, upstream)
    (plain_gradient,) = torch.autograd.grad(plain, plain_leaf, upstream)
    (true_gradient,) = torch.autograd.grad(truth, true_leaf, upstream.double())
    assert gradient.dtype == dtype
    floor = combine_floor(upstream, true_gradient)
    assert_as_accurate_as_plain(gradient, plain_gradient, true_gradient, floor, what="gradient of combine")


@given(images=st.integers(1, 40), width=st.integers(1, 70), k=st.integers(1, 4), layout=st.sampled_from(LAYOUTS))
def test_combine_any_shape(images, width, k, layout, backend):
    features = numbered(4 * images, width)
    leaf = lay_out(features, layout).requires_grad_()
    combined = combine(leaf, k, backend=backend)
    # Sums of integers in fp64 are exact. Dividing by k and multiplying by 1/k differ by a unit in the last place.
    torch.testing.assert_close(combined, oracles.combine(features, k), rtol=2**-51, atol=0)
    upstream = numbered(*combined.shape)
    (gradient,) = torch.autograd.grad(combined, leaf, lay_out(upstream, layout))
    (expected,) = torch.autograd.grad(oracles.combine(leaf, k), leaf, upstream)
    torch.testing.assert_close(gradient, expected, rtol=2**-50, atol=0)  # three divisions rather than one


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("images", [0, 3])
def test_combine_of_no_elements(images, dtype, backend):
    features = torch.empty(4 * images, 0 if images else 5, dtype=dtype, requires_grad=True)
    combined = combine(features, 2, backend=backend)
    assert combined.shape == (6 * images, features.shape[1])
    assert combined.dtype == dtype
    combined.sum().backward()
    assert features.grad is not None
    assert features.grad.shape == features.shape


def test_combine_expanded_rows(backend):
    features = torch.randn(1, 7).expand(12, -1)
    # Tolerance: an fp32 sum of three.
    torch.testing.assert_close(combine(features, 3, backend=backend), features, rtol=2**-22, atol=0)
    features = torch.randn(12, 1).expand(-1, 7)
    expected = combine(features.contiguous(), 3, backend=backend)
    assert torch.equal(combine(features, 3, backend=backend), expected)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_combine_sums_beyond_the_range_of_fp16(k, backend):
    greatest = torch.full((4, 5), 65504.0, dtype=torch.float16)
    assert torch.equal(combine(greatest, k, backend=backend), greatest[:1].expand(math.comb(4, k), -1))


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e20])
def test_combine_zero_tiny_and_huge_rows(scale, backend):
    features = torch.randn(12, 7)
    features[4] *= scale
    truth = oracles.combine(features.double(), 2)
    combined = combine(features, 2, backend=backend)
    # Tolerance per row: three units in the last place of fp32, relative to the averaged rows.
    rows = oracles.combine(features.double().abs(), 2)
    assert ((combined.double() - truth).abs() <= 3 * 2**-24 * rows).all()


def test_combine_of_one_patch_is_the_identity(backend):
    features = torch.randn(12, 7)
    assert torch.equal(combine(features, 1, backend=backend), features)


def test_combine_is_subset_major(backend):
    features = torch.tensor([[1.0], [10.0], [2.0], [20.0], [4.0], [40.0], [8.0], [80.0]])  # two images, four patches
    expected = [1.5, 15.0, 2.5, 25.0, 4.5, 45.0, 3.0, 30.0, 5.0, 50.0, 6.0, 60.0]
    assert combine(features, 2, backend=backend).flatten().tolist() == expected


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_combine_upstream_gradient_of_stride_zero(k, backend):
    features = torch.randn(12, 7, requires_grad=True)
    combine(features, k, backend=backend).sum().backward()
    # A patch is in C(3, k-1) subsets, each with weight 1/k. Tolerance: three additions of fp32 numbers near 1.
    expected = torch.full_like(features, math.comb(3, k - 1) / k)
    torch.testing.assert_close(features.grad, expected, rtol=2**-21, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_combine_upstream_gradient_strided(k, layout, backend):
    features = torch.randn(12, 7, dtype=torch.float64, requires_grad=True)
    combined = combine(features, k, backend=backend)
    upstream = torch.randn_like(combined)
    (expected,) = torch.autograd.grad(oracles.combine(features, k), features, upstream)
    (gradient,) = torch.autograd.grad(combined, features, lay_out(upstream, layout))
    torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=1e-15)  # fp64 sums of up to three terms


def test_combine_backward_twice_and_input_left_alone(backend):
    features = torch.randn(12, 7, requires_grad=True)
    before = features.detach().clone()
    combined = combine(features, 2, backend=backend)
    upstream = torch.randn_like(combined)
    kept = upstream.clone()
    (first,) = torch.autograd.grad(combined, features, upstream, retain_graph=True)
    (second,) = torch.autograd.grad(combined, features, upstream)
    assert torch.equal(first, second)
    assert torch.equal(features, before)
    assert torch.equal(upstream, kept)


def test_combine_without_gradient(backend):
    assert not combine(torch.randn(4, 3), 2, backend=backend).requires_grad


def test_combine_keeps_nan_to_the_subsets_that_hold_it(backend):
    features = torch.randn(12, 5)
    features[4, 2] = math.nan  # patch 1 of image 1
    combined = combine(features, 2, backend=backend)
    assert torch.equal(combined.isnan(), oracles.combine(features, 2).isnan())


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_combine_gradcheck(k, backend):
    features = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: combine(v, k, backend=backend), [features])


@pytest.mark.parametrize("k", [-1, 0, 5])
def test_combine_names_a_wrong_k(k, backend):
    with pytest.raises(ValueError, match=str(k)):
        combine(torch.randn(8, 3), k, backend=backend)


@pytest.mark.parametrize(("shape", "named"), [((7, 3), "7"), ((8, 3, 1), r"3|\(8, 3, 1\)"), ((8,), r"1|\(8,\)")])
def test_combine_names_a_wrong_shape(shape, named, backend):
    with pytest.raises(ValueError, match=named):
        combine(torch.randn(shape), 2, backend=backend)


def test_combine_names_a_wrong_dtype(backend):
    with pytest.raises(TypeError, match="int64"):
        combine(torch.ones(8, 3, dtype=torch.int64), 2, backend=backend)


def test_combine_refuses_a_second_derivative():
    leaf = torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(combine(leaf, 2, backend="triton").square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="_backward"):
        gradient.square().sum().backward()
