"""cuDNN's convolutions with a stand-in for cuDNN: what each plan is given, and what is made of its results.

tests/bench/test_cudnn_plans.py asks cuDNN itself; tests/kernels/test_gpu.py runs its plans.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cudnn import Cudnn
from torch.nn.grad import conv2d_input

from mnclglf_kernels import conv2d, convolution
from mnclglf_kernels._cudnn import plans
from mnclglf_kernels._cudnn.graphs import Shape
from mnclglf_kernels._cudnn.plans import Question
from mnclglf_kernels._cudnn.proof import half_sums, operands, plan_problem, spread
from mnclglf_kernels.ops.convolution import Convolved, moments, normalized

STREAM = 77
CPU = torch.device("cpu")
HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture
def cudnn(monkeypatch) -> Iterator[Cudnn]:
    """Returns the stand-in, which has plans for the CPU."""
    module = Cudnn()
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(plans, "has_plans", lambda device: True)
    monkeypatch.setattr("mnclglf_kernels.backend.cudnn_problem", lambda *_: None)
    monkeypatch.setattr("mnclglf_kernels.ops.convolution.cudnn_problem", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
    for kept in (plans.choice, plans.handle_of):
        kept.cache_clear()
    yield module
    for kept in (plans.choice, plans.handle_of):
        kept.cache_clear()


def call(
    dtype=HALF, prologue=True, views=2, inputs=16, outputs=24, taps=3, stride=1, padding=1, offset=0
) -> dict[str, Any]:
    """Makes the arguments of convolution; `offset` elements before x in its memory."""
    shape = (views * 2, 6, 5, inputs)
    x = torch.randn(offset + torch.Size(shape).numel()).to(dtype)[offset:].view(shape).permute(0, 3, 1, 2)
    weight = (torch.randn(outputs, inputs, taps, taps) / (inputs * taps**2) ** 0.5).to(dtype)
    scale, shift = torch.randn(2, views, inputs).unbind() if prologue else (None, None)
    return dict(x=x, weight=weight, stride=stride, padding=padding, views=views, scale=scale, shift=shift)


def check(given, found: Convolved, rounded_vectors: bool) -> None:
    """Compares with PyTorch in fp64, which reads the scale and shift that cuDNN does."""
    dtype = given["x"].dtype
    exact: dict[str, Any] = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    if given["scale"] is not None:
        vectors = [given[name].to(dtype if rounded_vectors else torch.float32) for name in ("scale", "shift")]
        exact |= dict(zip(("scale", "shift"), (v.double() for v in vectors), strict=True))
        exact["x"] = normalized(exact["x"], exact["scale"], exact["shift"]).to(dtype).double()
        exact |= {"scale": None, "shift": None}
    truth = convolution(**exact, backend="torch")
    eps, greatest = torch.finfo(dtype).eps, truth.y.abs().max()
    assert found.y.is_contiguous(memory_format=torch.channels_last)
    assert [t.dtype for t in found] == [dtype, torch.float32, torch.float32]
    assert (found.y - truth.y).abs().max() <= eps * greatest
    expected = moments(found.y, given["views"])
    for ours, theirs in zip(found[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [{}, dict(taps=1, padding=0, stride=2), dict(views=3, stride=2), dict(outputs=8, views=1)], ids=str
)
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize(("dtype", "half"), [(HALF, False), (HALF, True), (BRAIN, False), (BRAIN, True)], ids=str)
def test_a_convolution_is_given_to_cudnn_view_by_view(dtype, half, prologue, shape, cudnn):
    given = call(dtype, prologue, **shape)
    found = convolution(**given, half_sums=half, backend="cudnn")
    has_epilogue = dtype == HALF and not half
    check(given, found, rounded_vectors=has_epilogue)
    operations = ["mul", "add", "relu"] * prologue + ["fprop"] + ["sum", "squares"] * has_epilogue
    sums = "HALF" if half and dtype == HALF else "FLOAT"  # bf16 never sums in fp16
    assert cudnn.executed == [(operations, STREAM, sums)] * given["views"]
    convolution(**given, half_sums=half, backend="cudnn")
    assert cudnn.built == 1


def test_a_stride_an_address_or_a_layout_that_cudnn_does_not_take_is_copied(cudnn):
    contiguous: dict[str, Any] = dict(x=torch.randn(4, 16, 6, 5).half(), weight=torch.randn(24, 16, 3, 3).half().mT)
    for given in (call(offset=1), call() | contiguous):
        check(given, convolution(**given, backend="cudnn"), rounded_vectors=True)
    assert cudnn.executed


def test_results_are_written_where_they_stay(cudnn):
    """Checks that no image is copied after the plan: each view's y is a slice of the result."""
    given, written = call(), []
    execute = plans.Plan.run

    def note(self, device, tensors):
        written.append(tensors["y"].data_ptr())
        execute(self, device, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans.Plan, "run", note)
        y = convolution(**given, backend="cudnn").y
    assert written == [part.data_ptr() for part in y.chunk(2)]


def test_a_view_that_is_no_multiple_of_16_bytes_runs_in_pytorch(cudnn):
    given = call(inputs=3, prologue=False)  # 2 x 3 x 6 x 5 elements of 2 bytes: 360
    with pytest.warns(UserWarning, match=r"2 x 3 x 6 x 5 to 24.*16 bytes.*PyTorch"):
        found = convolution(**given, backend="cudnn")
    assert not cudnn.executed
    check(given, found, rounded_vectors=False)


def test_without_a_plan_it_runs_in_pytorch_and_says_so_once(cudnn):
    cudnn.refuses = lambda operations: True
    given = call()
    with pytest.warns(UserWarning, match=r"2 x 16 x 6 x 5 to 24.*float16.*NotSupported: no engine.*PyTorch"):
        found = convolution(**given, backend="cudnn")
    check(given, found, rounded_vectors=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convolution(**given, backend="cudnn")
    assert not cudnn.executed


def test_without_an_epilogue_the_moments_are_those_of_the_result(cudnn):
    cudnn.refuses = lambda operations: "sum" in operations
    given = call()
    check(given, convolution(**given, backend="cudnn"), rounded_vectors=False)
    assert cudnn.executed == [(["mul", "add", "relu", "fprop"], STREAM, "FLOAT")] * 2


QUESTION: dict[str, Any] = dict(x_shape=(2, 16, 6, 5), weight_shape=(24, 16, 3, 3), dtype=HALF, device=CPU, padding=1)
KINDS = [
    {},
    dict(prologue=True),
    dict(half_sums=True),
    dict(half_sums=True, prologue=True),
    dict(dtype=BRAIN, prologue=True),
    dict(stride=2),
]


@pytest.mark.parametrize(
    "changes", [*KINDS, dict(gradient=True, half_sums=True), dict(gradient=True, half_sums=True, stride=2)], ids=str
)
def test_a_right_plan_passes_its_proof_and_a_wrong_one_runs_in_pytorch(changes, cudnn):
    assert plan_problem(**QUESTION | changes) is None
    assert cudnn.executed
    plans.choice.cache_clear()
    cudnn.spoils = lambda operations: True
    assert "is off by" in str(plan_problem(**QUESTION | changes))
    cudnn.executed.clear()
    assert "is off by" in str(plan_problem(**QUESTION | changes))  # it stays left out
    assert not cudnn.executed


def test_a_form_that_fails_its_proof_is_replaced(cudnn):
    cudnn.spoils = lambda operations: "sum" in operations
    assert plan_problem(**QUESTION, prologue=True) is None
    cudnn.executed.clear()
    given = call()
    check(given, convolution(**given, backend="cudnn"), rounded_vectors=False)
    assert [operations for operations, *_ in cudnn.executed] == [["mul", "add", "relu", "fprop"]] * 2


def test_a_plan_that_cannot_be_built_is_a_problem(cudnn):
    cudnn.refuses = lambda operations: True
    with pytest.warns(UserWarning, match="no plan"):
        assert "no engine" in str(plan_problem(**QUESTION))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("taps", "padding"), [(3, 1), (1, 0), (3, 0), (2, 1), (1, 1)])
def test_the_emulation_s_gradient_is_torch_s(taps, padding, stride):
    """Checks in numbers that fp16 holds exactly, so that no sum is rounded."""
    shape = Shape(2, 20, 6, 5, 18, taps, stride, padding)
    x, weight, *_ = operands(Question(shape, HALF), CPU)
    x, weight = (t.sign() for t in (x, weight))
    upstream = torch.randn(2, 18, *shape.sides).sign().half()
    found = half_sums(spread(upstream, shape), weight.flip(2, 3).transpose(0, 1), 1)
    assert torch.equal(found.double(), conv2d_input(x.shape, weight.double(), upstream.double(), stride, padding))
    y = half_sums(F.pad(x, [padding] * 4), weight, stride)
    assert torch.equal(y.double(), F.conv2d(x.double(), weight.double(), stride=stride, padding=padding))


def test_the_emulation_rounds_after_every_16_products():
    x = torch.cat([torch.full((1, 16, 1, 1), 128.0), torch.full((1, 16, 1, 1), 2**-5)], 1).half()
    assert half_sums(x, torch.ones(1, 32, 1, 1).half(), 1).item() == 2048  # 2048 + 1/2: an fp16 has 2 as its last digit


@pytest.mark.parametrize(("forward", "backward"), [(True, True), (True, False), (False, True), (False, False)])
def test_conv2d_sums_in_fp16_where_it_is_told_to(forward, backward, cudnn):
    given = call(prologue=False)
    leaves = given["x"].requires_grad_(), given["weight"].requires_grad_()
    switches: dict[str, Any] = dict(half_sums_forward=forward, half_sums_input_gradient=backward)
    y = conv2d(*leaves, stride=2, padding=1, **switches)
    upstream = torch.randn(y.shape).half()
    gradients = torch.autograd.grad(y, leaves, upstream)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    truth = F.conv2d(*doubles, stride=2, padding=1)
    expected = truth, *torch.autograd.grad(truth, doubles, upstream.double())
    for ours, true in zip((y, *gradients), expected, strict=True):
        assert ours.dtype == HALF
        assert (ours - true).abs().max() <= 2**-10 * true.abs().max()
    ran = [(["fprop"], STREAM, "HALF")] * forward + [(["dgrad"], STREAM, "HALF")] * backward
    assert cudnn.executed == ran


@pytest.mark.parametrize("learns", [(True, False), (False, True)])
def test_conv2d_computes_only_the_gradients_that_are_asked_for(learns, cudnn):
    given = call(prologue=False)
    leaves = [t.requires_grad_(asks) for t, asks in zip((given["x"], given["weight"]), learns, strict=True)]
    conv2d(*leaves, padding=1, half_sums_forward=True, half_sums_input_gradient=True).sum().backward()
    assert [t.grad is not None for t in leaves] == [*learns]
    assert (["dgrad"], STREAM, "HALF") in cudnn.executed or not learns[0]
    assert len(cudnn.executed) == 1 + learns[0]


@pytest.mark.parametrize("dtype", [BRAIN, torch.float32])
def test_conv2d_sums_nothing_but_fp16_in_fp16(dtype, cudnn):
    given = call(dtype, prologue=False)
    y = conv2d(given["x"], given["weight"], half_sums_forward=True, half_sums_input_gradient=True)
    assert torch.equal(y, F.conv2d(given["x"], given["weight"]))
    assert not cudnn.executed


def test_conv2d_without_a_plan_is_torch_s(cudnn):
    cudnn.refuses = lambda operations: True
    x, weight, *_ = operands(Question(Shape(2, 16, 6, 5, 8, 3, 1, 1), HALF), CPU)
    leaves, twins = ((x.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2))
    with pytest.warns(UserWarning, match="no plan.* fp16 sums"):
        y = conv2d(*leaves, padding=1, half_sums_forward=True, half_sums_input_gradient=True)
    with pytest.warns(UserWarning, match="no plan.* gradient of x"):
        y.square().sum().backward()
    F.conv2d(*twins, padding=1).square().sum().backward()
    for ours, theirs in zip(leaves, twins, strict=True):  # channels_last is summed in another order
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad - theirs.grad).abs().max() <= 2**-9 * theirs.grad.abs().max()
