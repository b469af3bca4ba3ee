"""Proof of cuDNN's plans on the current GPU, before a run: each is compared with PyTorch in fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from mnclglf_kernels._cudnn.convolution import conv2d_backward, convolution
from mnclglf_kernels._cudnn.graphs import Shape
from mnclglf_kernels._cudnn.plans import Question, choice
from mnclglf_kernels.ops.convolution import moments, normalized, torch_convolution

BLOCK = 16  # products after which a tensor core rounds an fp16 sum


def plan_problem(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    stride: int = 1,
    padding: int = 0,
    half_sums: bool = False,
    prologue: bool = False,
    gradient: bool = False,
) -> str | None:
    """Returns why cuDNN does not compute a convolution, or None; what fails here runs the PyTorch form from then on.

    The result of a plan must be at most twice as far from fp64 as PyTorch's in the same dtype. One that sums in fp16
    must be at most twice as far as sums that are rounded to fp16 after every 16 products, the taps outermost. Mean and
    variance may be off by as much, or by a unit in the last place of the dtype, of their greatest. A form with an
    epilogue that fails is replaced by one without, if that passes.

    Args:
        x_shape: [N, C, H, W] of one view.
        weight_shape: [K, C, T, T].
        dtype: fp16 or bf16.
        device: GPU to run on.
        stride: step of the filter.
        padding: rows and columns of zeros on each side.
        half_sums: the products are summed in fp16.
        prologue: with scale and shift.
        gradient: of x, as conv2d's backward computes it, instead of a result.
    """
    (n, c, height, width), (outputs, _, taps, _) = x_shape, weight_shape
    shape = Shape(n, c, height, width, outputs, taps, stride, padding)
    question = Question(shape, dtype, half_sums, prologue, gradient)
    made = choice(question, device)
    while made.plan is not None:
        problem = gradient_problem(question, device) if gradient else forward_problem(question, device)
        if problem is None:
            return None
        made.reject(problem)
    return "; ".join(made.reasons)


def forward_problem(question: Question, device: torch.device) -> str | None:
    """Compares y, mean and variance of one view."""
    x, weight, scale, shift = operands(question, device)
    vectors = (scale, shift) if question.prologue else (None, None)
    settings = question.shape.stride, question.shape.padding, 1
    found = convolution(x, weight, *vectors, *settings, question.half_sums)
    wide = (None if t is None else t.double() for t in vectors)
    truth = torch_convolution(x.double(), weight.double(), *settings, *wide)
    if question.half_sums:
        read = normalized(x, scale, shift) if question.prologue else x
        y = half_sums(F.pad(read, [question.shape.padding] * 4), weight, question.shape.stride)
        plain = (y, *moments(y, 1))
    else:
        plain = torch_convolution(x, weight, *settings, *vectors)
    eps = torch.finfo(question.dtype).eps
    rows = zip(("y", "mean", "var"), found, plain, truth, (2**-20, eps, eps), strict=True)
    return next((problem for row in rows if (problem := excess(*row)) is not None), None)


def gradient_problem(question: Question, device: torch.device) -> str | None:
    """Compares the gradient of x for a random upstream gradient."""
    shape = question.shape
    x, weight, *_ = operands(question, device)
    upstream = torch.randn((shape.images, shape.outputs, *shape.sides), generator=torch.Generator().manual_seed(1))
    upstream = upstream.to(device, question.dtype)
    settings = shape.stride, shape.padding
    (found,) = conv2d_backward(upstream, x, weight, *settings, question.half_sums, True, False)
    truth = conv2d_input(x.shape, weight.double(), upstream.double(), *settings)
    plain = conv2d_input(x.shape, weight, upstream, *settings)
    if question.half_sums:
        plain = half_sums(spread(upstream, shape), weight.flip(2, 3).transpose(0, 1), 1)
    return excess("the gradient of x", found, plain, truth, 2**-20)


def operands(question: Question, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Makes x, weight, scale and shift."""
    shape, generator = question.shape, torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    x = random(shape.images, shape.inputs, shape.height, shape.width)
    weight = random(shape.outputs, shape.inputs, shape.taps, shape.taps) / (shape.inputs * shape.taps**2) ** 0.5
    scale, shift = random(2, 1, shape.inputs).unbind()
    return x.to(device, question.dtype), weight.to(device, question.dtype), scale.to(device), shift.to(device)


def half_sums(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Returns the convolution of padded images, its sum rounded to fp16 after every 16 products."""
    taps, (height, width) = weight.shape[2], x.shape[2:]
    down, right = ((side - taps) // stride * stride + 1 for side in (height, width))
    total = torch.zeros(())
    for row in range(taps):
        for column in range(taps):
            part = x[:, :, row : row + down, column : column + right]
            for first in range(0, x.shape[1], BLOCK):
                block, filters = part[:, first : first + BLOCK], weight[:, first : first + BLOCK, row, column]
                products = F.conv2d(block.double(), filters.double()[:, :, None, None], stride=stride)
                total = (total.to(products) + products).half()
    return total


def spread(upstream: Tensor, shape: Shape) -> Tensor:
    """Returns the upstream gradient, padded: its convolution with the turned filters is the gradient of x."""
    down, right = ((side - 1) * shape.stride + 1 for side in shape.sides)
    wide = upstream.new_zeros((shape.images, shape.outputs, down, right))
    wide[:, :, :: shape.stride, :: shape.stride] = upstream
    before = shape.taps - 1 - shape.padding
    after = [side + shape.taps - 1 - before - given for side, given in ((shape.width, right), (shape.height, down))]
    return F.pad(wide, [before, after[0], before, after[1]])


def excess(name: str, found: Tensor, plain: Tensor, truth: Tensor, floor: float) -> str | None:
    """Returns a description of an error that is more than twice that of `plain`, and `floor` of the greatest value."""
    error, allowed = ((t.double() - truth).abs().max().item() for t in (found, plain))
    limit = 2 * allowed + floor * truth.abs().max().item()
    return None if error <= limit else f"{name} is off by {error:.3g}, more than {limit:.3g}"  # False for NaN
