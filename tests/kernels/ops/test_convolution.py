"""Tests of convolution against loops in fp64, and of its moments; conv2d beside torch's."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import ULPS_FP32
from torch import Tensor

from mnclglf_kernels import Backend, conv2d, convolution
from mnclglf_kernels._triton import convolution as kernels
from mnclglf_kernels._triton import launch
from mnclglf_kernels._triton.tiles import Tile
from mnclglf_kernels.ops.convolution import has_triton_kernel

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]
KERNEL: dict[str, Any] = dict(stride=1, padding=1)  # what the Triton kernel computes, of 3 taps
# Views, images per view, channels, channels of y, sides: a pixel; a part that is not full; more than one tile each way.
SHAPES = [(1, 1, 16, 16, (1, 1)), (2, 3, 32, 16, (5, 3)), (3, 2, 16, 80, (9, 8)), (2, 1, 144, 48, (4, 4))]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def operands(dtype, views, images, inputs, outputs, sides, taps=3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Makes x, weight, scale and shift."""
    x = torch.randn(views * images, inputs, *sides).to(dtype)
    weight = (torch.randn(outputs, inputs, taps, taps) / (inputs * taps**2) ** 0.5).to(dtype)
    scale, shift = (torch.randn(2, views, inputs) + 0.5).to(wide(dtype)).unbind()
    return x, weight, scale, shift


def read(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Returns what the convolution reads, image by image."""
    images = len(x) // len(scale)
    rows = [
        F.relu(x[n].to(scale) * scale[v, :, None, None] + shift[v, :, None, None])
        for v, n in ((n // images, n) for n in range(len(x)))
    ]
    return torch.stack(rows).to(x.dtype)


def oracle(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Returns the convolution in fp64, pixel by pixel and tap by tap."""
    x, weight = x.double(), weight.double()
    (n, _, height, width), (outputs, _, taps, _) = x.shape, weight.shape
    down, right = ((side + 2 * padding - taps) // stride + 1 for side in (height, width))
    y = torch.zeros(n, outputs, down, right, dtype=torch.float64)
    for i, j, s, t in product(range(down), range(right), range(taps), range(taps)):
        row, column = i * stride + s - padding, j * stride + t - padding
        if 0 <= row < height and 0 <= column < width:
            y[:, :, i, j] += x[:, :, row, column] @ weight[:, :, s, t].T
    return y


def oracle_moments(y: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Returns mean and biased variance of each view and channel, in fp64."""
    rows = [view.double().movedim(1, 0).flatten(1) for view in y.chunk(views)]
    means = [row.mean(1) for row in rows]
    variances = [(row - mean[:, None]).square().mean(1) for row, mean in zip(rows, means, strict=True)]
    return torch.stack(means), torch.stack(variances)


def check(x, weight, scale=None, shift=None, *, views=1, stride=1, padding=0, backend: Backend) -> None:
    """Holds y, mean and variance of a call against the oracle's."""
    given = x.clone(), weight.clone()
    y, mean, var = convolution(
        x, weight, stride=stride, padding=padding, views=views, scale=scale, shift=shift, backend=backend
    )
    assert torch.equal(x, given[0])
    assert torch.equal(weight, given[1])
    truth = oracle(x if scale is None or shift is None else read(x, scale, shift), weight, stride, padding)
    assert y.shape == truth.shape
    assert (y.dtype, mean.dtype, var.dtype) == (x.dtype, wide(x.dtype), wide(x.dtype))
    eps, sums = torch.finfo(x.dtype).eps, ULPS_FP32 * torch.finfo(wide(x.dtype)).eps
    greatest = truth.abs().max()
    assert (y - truth).abs().max() <= (eps / 2 + sums) * greatest + sums
    launched = backend == "triton" and has_triton_kernel(x, weight, stride, padding, views)
    assert y.is_contiguous(memory_format=torch.channels_last) or not launched
    expected = oracle_moments(truth if launched else y, views)  # Triton's are of the sums before they are rounded
    for found, true in zip((mean, var), expected, strict=True):
        assert found.shape == (views, len(weight))
        assert (found - true).abs().max() <= sums * (1 + greatest) ** 2


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolution(dtype, shape, prologue, backend):
    given = operands(dtype, *shape)
    check(*given[: 4 if prologue else 2], **KERNEL, views=shape[0], backend=backend)


@given(
    views=st.integers(1, 3),
    images=st.integers(1, 3),
    inputs=st.integers(1, 20),
    outputs=st.integers(1, 20),
    sides=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    taps=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_convolution_any_shape(views, images, inputs, outputs, sides, taps, stride, padding, dtype, seed, backend):
    """Most have no Triton kernel, and run the PyTorch form."""
    torch.manual_seed(seed)
    taps = min(taps, min(sides) + 2 * padding)
    backend = "torch" if dtype == torch.float64 else backend
    given = operands(dtype, views, images, inputs, outputs, sides, taps)
    check(*given[: 2 + 2 * (seed % 2)], views=views, stride=stride, padding=padding, backend=backend)


@given(
    views=st.integers(1, 3),
    images=st.integers(1, 3),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    sides=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=15)
def test_convolution_any_shape_of_the_kernel(views, images, inputs, outputs, sides, dtype, seed):
    torch.manual_seed(seed)
    given = operands(dtype, views, images, 16 * inputs, 16 * outputs, sides)
    assert has_triton_kernel(*given[:2], **KERNEL, views=views)
    check(*given[: 2 + 2 * (seed % 2)], **KERNEL, views=views, backend="triton")


@pytest.mark.parametrize("inputs", [1, 16])
@pytest.mark.parametrize("place", ["x", "scale", "shift"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_its_neighbors_and_no_other_image(value, place, inputs, backend):
    """Also NaN, which a ReLU could drop."""
    x, weight, scale, shift = operands(torch.float32, 2, 2, inputs, 16, (4, 4))
    {"x": x[1, :, 0], "scale": scale[1], "shift": shift[1]}[place][0] = value
    expected = F.conv2d(read(x, scale, shift), weight, padding=1)
    y, mean, _ = convolution(x, weight, **KERNEL, views=2, scale=scale, shift=shift, backend=backend)
    torch.testing.assert_close(y, expected, equal_nan=True)
    touched = expected.view(2, 2, 16, 16).isfinite().all(3).all(1)
    assert torch.equal(mean.isfinite(), touched)


@pytest.mark.parametrize("inputs", [1, 16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_reaches_its_channel_and_no_other(value, inputs, backend):
    """Where it meets the padding, torch may skip the product: only the inner pixels have one answer."""
    x, weight, *_ = operands(torch.float32, 1, 2, inputs, 16, (4, 4))
    weight[3, 0, 0, 0] = value
    y = convolution(x, weight, **KERNEL, backend=backend).y
    assert not y[:, 3, 1:, 1:].isfinite().any()
    assert y[:, [*range(3), *range(4, 16)]].isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "view", [lambda x: x[::2], lambda x: x.mT, lambda x: x[:, :16]], ids=["images", "turned", "part"]
)
def test_convolution_strided(view, layout, backend):
    x = view(torch.randn(4, 32, 5, 5).contiguous(memory_format=layout))
    weight = torch.randn(16, x.shape[1], 3, 3).mT
    vectors = torch.randn(2, x.shape[1], 2).unbind()
    check(x, weight, *(v.T for v in vectors), **KERNEL, views=2, backend=backend)


def test_a_mean_that_is_large_against_its_deviation_costs_no_digits(backend):
    """Checks a mean of 160 and a deviation near 0.01, in many parts: a sum of squares in fp32 would leave nothing."""
    x = torch.ones(2, 16, 24, 24) + 1e-4 * torch.randn(2, 16, 24, 24)
    weight = torch.zeros(16, 16, 3, 3)
    weight[:, :, 1, 1] = 10
    y, mean, var = convolution(x, weight, **KERNEL, backend=backend)
    expected = oracle_moments(y, 1)
    torch.testing.assert_close(mean.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), expected[1], rtol=1e-2, atol=0)


@pytest.mark.parametrize(("rows", "sides"), [(1, (1, 1)), (64 * 700 + 5, (5, 1))])
def test_parts_are_combined_as_if_there_were_one(rows, sides):
    """Checks one part, and more than the lanes of a program, the last one with fewer pixels: moments are drawn."""
    t = Tile(64, 16, 16, 4, 2)
    x, weight = torch.empty(rows, 16, *sides, device="meta"), torch.empty(16, 16, 3, 3, device="meta")
    mean, var = torch.empty(2, 1, 16).unbind()
    _, combine = kernels.convolution_launches(x, weight, None, None, x, mean, var, t)
    pixels = rows * sides[0]
    parts = combine.arguments["P"]
    assert (parts > kernels.LANES) == (rows > 1)
    drawn = torch.randn(1, parts, 2, 16).abs() + torch.tensor([100.0, 0.0]).view(1, 1, 2, 1)
    launch.run(
        [launch.Launch(combine.kernel, combine.count, combine.grid, combine.arguments | dict(moments=drawn))], x.device
    )
    counts = torch.full((parts, 1), 64.0, dtype=torch.float64)
    counts[-1] = pixels - 64 * (parts - 1)
    means, squares = drawn[0].double().unbind(1)
    center = (counts * means).sum(0) / pixels
    torch.testing.assert_close(mean[0].double(), center, rtol=1e-6, atol=0)
    spread = (squares + counts * (means - center).square()).sum(0) / pixels
    torch.testing.assert_close(var[0].double(), spread, rtol=1e-5, atol=0)


def bad(**changes: Any) -> dict[str, Any]:
    """Makes the arguments of a call with some changed."""
    x, weight, scale, shift = operands(torch.float32, 2, 2, 3, 4, (5, 5))
    return dict(x=x, weight=weight, scale=scale, shift=shift, views=2) | changes


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (dict(x=torch.ones(4, 3, 5)), ValueError, r"\(4, 3, 5\).*\[V \* N, C, H, W\]"),
        (dict(x=torch.ones(0, 3, 5, 5)), ValueError, r"\(0, 3, 5, 5\)"),
        (dict(x=torch.ones(4, 3, 5, 5, dtype=torch.int32)), TypeError, "int32.*floating"),
        (dict(weight=torch.ones(4, 3, 3, 2)), ValueError, r"\(4, 3, 3, 2\).*\[K, C, T, T\]"),
        (dict(weight=torch.ones(4, 2, 3, 3)), ValueError, "2 channels.* 3"),
        (dict(weight=torch.ones(4, 3, 3, 3).half()), TypeError, "float16.*float32"),
        (dict(weight=torch.ones(4, 3, 8, 8), padding=1), ValueError, "padding 1.* 8 taps"),
        (dict(stride=0), ValueError, "stride 0"),
        (dict(padding=-1), ValueError, "padding -1"),
        (dict(views=3), ValueError, "views 3.* 4"),
        (dict(views=0), ValueError, "views 0"),
        (dict(shift=None), ValueError, "shift is None.*both"),
        (dict(scale=torch.ones(3)), ValueError, r"scale.*\(3,\).*\[V, C\], \(2, 3\)"),
        (dict(shift=torch.ones(2, 3).half()), TypeError, "shift.*float16.*float32"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(changes, error, match, backend):
    with pytest.raises(error, match=match):
        convolution(**bad(**changes), backend=backend)


@pytest.mark.parametrize("name", ["x", "weight", "scale", "shift"])
def test_there_is_no_gradient(name, backend):
    arguments = bad()
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{name} requires a gradient.*no_grad"):
        convolution(**arguments, backend=backend)
    with torch.no_grad():
        assert not convolution(**arguments, backend=backend).y.requires_grad


def test_auto_is_pytorch_s_form_until_something_has_timed_the_others(monkeypatch):
    monkeypatch.setattr("mnclglf_kernels.ops.convolution.torch_convolution", lambda *_: "PyTorch")
    monkeypatch.setattr("mnclglf_kernels.backend.triton_problem", lambda *_: None)
    monkeypatch.setattr("mnclglf_kernels.backend.cudnn_problem", lambda *_: None)
    arguments = bad()
    assert convolution(**arguments) == "PyTorch"
    arguments = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments.items()}
    assert convolution(**arguments) == "PyTorch"


def test_autocast_changes_nothing(backend):
    x, weight, scale, shift = operands(torch.float32, 2, 1, 16, 16, (4, 4))
    plain = convolution(x, weight, **KERNEL, views=2, scale=scale, shift=shift, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = convolution(x, weight, **KERNEL, views=2, scale=scale, shift=shift, backend=backend)
    assert all(torch.equal(*pair) for pair in zip(plain, cast, strict=True))


@pytest.mark.parametrize("prologue", [False, True])
def test_the_kernel_in_fp64_is_the_formula(prologue):
    """The operator does not offer fp64, in which nothing is rounded. conftest.py checks each store."""
    x, weight, scale, shift = (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        for t in operands(torch.float64, 2, 3, 32, 32, (5, 3))
    )
    vectors = (scale, shift) if prologue else (None, None)
    results = kernels.empty_results(x, 32, 2)
    launch.run(kernels.convolution_launches(x, weight, *vectors, *results, Tile(32, 16, 16, 4, 2)), x.device)
    truth = oracle(read(x, scale, shift) if prologue else x, weight, 1, 1)
    for found, true in zip(results, (truth, *oracle_moments(truth, 2)), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_conv2d_is_torch_s_without_a_gpu(dtype, backend):
    x, weight, *_ = operands(dtype, 1, 2, 3, 4, (5, 4))
    upstream, found = torch.randn(2, 4, 3, 2).to(dtype), []
    ours = partial(conv2d, half_sums_forward=True, half_sums_input_gradient=True, backend=backend)
    for function in (F.conv2d, ours):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = function(*leaves, stride=2, padding=1)
        found.append((y, *torch.autograd.grad(y, leaves, upstream)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_conv2d_names_a_wrong_argument():
    with pytest.raises(TypeError, match=r"float16.*float32"):
        conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3).half())
