"""Tests of divide against the loops of the oracle, forward and backward."""

import math
import re

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mnclglf_kernels import divide

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
IMAGE_SHAPES = [
    (1, 1, 2, 2),
    (1, 3, 4, 6),
    (3, 2, 8, 4),
    (63, 1, 2, 4),
    (65, 3, 6, 2),
    (123, 1, 2, 2),
    (255, 2, 4, 2),
    (1, 1, 96, 246),
    (2, 3, 2, 4096),
]


def numbered(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns distinct elements, so that no two places can be confused."""
    return torch.arange(math.prod(shape)).reshape(shape).to(dtype)


@pytest.mark.parametrize("shape", IMAGE_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divide_copies_patches(shape, dtype, backend):
    images = torch.randn(shape, dtype=dtype)
    patches = divide(images, backend=backend)
    assert patches.dtype == dtype
    assert torch.equal(patches, oracles.divide(images))  # divide copies, so results are exact


def test_divide_is_patch_major(backend):
    patches = divide(numbered(2, 1, 2, 2), backend=backend)
    assert patches.flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@given(
    images=st.integers(1, 5),
    channels=st.integers(1, 4),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_divide_any_shape(images, channels, height, width, memory_format, backend):
    x = numbered(images, channels, 2 * height, 2 * width).contiguous(memory_format=memory_format).requires_grad_()
    patches = divide(x, backend=backend)
    assert torch.equal(patches, oracles.divide(x))
    upstream = numbered(*patches.shape)
    (gradient,) = torch.autograd.grad(patches, x, upstream)
    (expected,) = torch.autograd.grad(oracles.divide(x), x, upstream)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_divide_keeps_the_memory_format(memory_format, backend):
    x = torch.randn(3, 4, 8, 6).contiguous(memory_format=memory_format)
    assert divide(x, backend=backend).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(2, 3),
        lambda x: x.transpose(0, 1),
        lambda x: x[:, :, ::2, :],
        lambda x: x[:, :, :, ::2],
        lambda x: x[1:, 1:],
        lambda x: x.flip(3),
        lambda x: x[:1].expand(5, -1, -1, -1),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
    ],
    ids=["sides", "images and channels", "rows", "columns", "inner", "flipped", "one image", "one channel"],
)
def test_divide_strided_images(view, backend):
    x = view(numbered(4, 4, 8, 8))
    assert torch.equal(divide(x, backend=backend), oracles.divide(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divide_of_no_images(dtype, backend):
    x = torch.empty(0, 3, 4, 6, dtype=dtype, requires_grad=True)
    patches = divide(x, backend=backend)
    assert patches.shape == (0, 3, 2, 3)
    assert patches.dtype == dtype
    patches.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_divide_upstream_gradient_of_stride_zero(backend):
    x = torch.randn(3, 2, 4, 6, requires_grad=True)
    divide(x, backend=backend).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_divide_upstream_gradient_in_channels_last(backend):
    x = numbered(3, 2, 4, 6).requires_grad_()
    patches = divide(x, backend=backend)
    upstream = numbered(*patches.shape)
    (expected,) = torch.autograd.grad(patches, x, upstream, retain_graph=True)
    (gradient,) = torch.autograd.grad(patches, x, upstream.contiguous(memory_format=torch.channels_last))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(2, 3), lambda x: x[:, :, ::2, ::2], lambda x: x[:1].expand(8, -1, -1, -1)],
    ids=["sides", "every second", "one patch"],
)
def test_divide_upstream_gradient_strided(view, backend):
    x = numbered(2, 3, 4, 4).requires_grad_()
    upstream = view(numbered(8, 3, 4, 4))[:, :, :2, :2]
    (gradient,) = torch.autograd.grad(divide(x, backend=backend), x, upstream)
    (expected,) = torch.autograd.grad(oracles.divide(x), x, upstream)
    assert torch.equal(gradient, expected)


def test_divide_backward_twice_and_input_left_alone(backend):
    x = torch.randn(3, 2, 4, 6, requires_grad=True)
    before = x.detach().clone()
    patches = divide(x, backend=backend)
    upstream = torch.randn_like(patches)
    kept = upstream.clone()
    (first,) = torch.autograd.grad(patches, x, upstream, retain_graph=True)
    (second,) = torch.autograd.grad(patches, x, upstream)
    assert torch.equal(first, second)
    assert torch.equal(x, before)
    assert torch.equal(upstream, kept)


def test_divide_without_gradient(backend):
    assert not divide(torch.randn(1, 1, 2, 2), backend=backend).requires_grad


def test_divide_keeps_nan_in_its_place(backend):
    x = numbered(2, 1, 4, 4)
    x[1, 0, 2, 3] = math.nan
    assert torch.equal(divide(x, backend=backend).isnan(), oracles.divide(x).isnan())


def test_divide_gradcheck(backend):
    x = torch.randn(2, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda images: divide(images, backend=backend), [x])


@pytest.mark.parametrize(("shape", "named"), [((1, 1, 31, 4), "31"), ((1, 1, 4, 33), "33"), ((1, 1, 7, 7), "7")])
def test_divide_names_an_odd_side(shape, named, backend):
    with pytest.raises(ValueError, match=named):
        divide(torch.randn(shape), backend=backend)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 3, 32, 32)], ids=str)
def test_divide_names_the_number_of_dimensions(shape, backend):
    with pytest.raises(ValueError, match=f"{len(shape)}|{re.escape(str(shape))}"):
        divide(torch.randn(shape), backend=backend)


def test_divide_refuses_a_second_derivative():
    leaf = torch.randn(1, 1, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(divide(leaf, backend="triton").square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="_backward"):
        gradient.square().sum().backward()
