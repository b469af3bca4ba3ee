"""convolution and conv2d with cuDNN's plans: one opaque operator each, and one for conv2d's backward.

A plan is for one view's images. The views run one after the other, and write into slices of one result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mnclglf_kernels._cudnn.graphs import Shape
from mnclglf_kernels._cudnn.plans import ALIGNMENT, Question, plan_of
from mnclglf_kernels.ops.convolution import moments, torch_convolution


def shape_of(x: Tensor, weight: Tensor, stride: int, padding: int, views: int = 1) -> Shape:
    """Returns the convolution of one view."""
    (n, c, height, width), (outputs, _, taps, _) = x.shape, weight.shape
    return Shape(int(n) // views, int(c), int(height), int(width), int(outputs), int(taps), stride, padding)


def dense(x: Tensor) -> Tensor:
    """Returns x in channels_last at an address that cuDNN takes; no copy if it is so already."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def empty_images(like: Tensor, channels: int, sides: tuple[int, int]) -> Tensor:
    return like.new_empty((len(like), *sides, channels)).permute(0, 3, 1, 2)


def empty_results(x: Tensor, weight: Tensor, stride: int, padding: int, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Makes y, mean and variance."""
    y = empty_images(x, len(weight), shape_of(x, weight, stride, padding).sides)
    mean, var = (x.new_empty((views, len(weight)), dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    return y, mean, var


@torch.library.custom_op("mnclglf::cudnn_convolution", mutates_args=())
def convolution(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: int,
    views: int,
    half_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, and mean and biased variance of each view, [V, K]."""
    half_sums = half_sums and x.dtype == torch.float16
    question = Question(shape_of(x, weight, stride, padding, views), x.dtype, half_sums, scale is not None)
    plan = plan_of(question, x.device)
    if plan is None:
        y, mean, var = torch_convolution(x, weight, stride, padding, views, scale, shift)
        return y.contiguous(memory_format=torch.channels_last), mean, var
    x, weight = dense(x), dense(weight)
    y, mean, var = empty_results(x, weight, stride, padding, views)
    sums = mean.new_empty((2, views, -(-len(weight) // 4) * 4))[:, :, : len(weight)]  # rows of 16 bytes
    vectors: dict[str, Tensor] = {}
    if scale is not None and shift is not None:
        dtype = torch.float32 if plan.form.fp32_vectors else x.dtype
        vectors = {name: t.to(dtype).contiguous() for name, t in (("scale", scale), ("shift", shift))}
    for v, (part, out) in enumerate(zip(x.chunk(views), y.chunk(views), strict=True)):
        given = dict(x=part, weight=weight, y=out) | {name: t[v] for name, t in vectors.items()}
        given |= dict(sum=sums[0, v], squares=sums[1, v]) if plan.form.epilogue else {}
        plan.run(x.device, given)
    if not plan.form.epilogue:
        return y, *moments(y, views)
    pixels = y[:, 0].numel() // views
    mean.copy_(sums[0] / pixels)
    var.copy_((sums[1] / pixels - mean.square()).clamp_(min=0))
    return y, mean, var


@convolution.register_fake
def _(x: Tensor, weight: Tensor, scale: Any, shift: Any, stride: int, padding: int, views: int, _: bool) -> Any:
    return empty_results(x, weight, stride, padding, views)


@torch.library.custom_op("mnclglf::cudnn_conv2d", mutates_args=())
def conv2d(
    x: Tensor, weight: Tensor, stride: int, padding: int, half_sums: bool, half_sums_of_gradient: bool
) -> Tensor:
    """Returns a convolution, summed in fp16 if `half_sums`; its gradient of x is if `half_sums_of_gradient`."""
    question = Question(shape_of(x, weight, stride, padding), x.dtype, half_sums=True)
    plan = plan_of(question, x.device) if half_sums else None
    if plan is None:
        return F.conv2d(x, weight, stride=stride, padding=padding).contiguous(memory_format=torch.channels_last)
    x, weight = dense(x), dense(weight)
    y = empty_images(x, len(weight), question.shape.sides)
    plan.run(x.device, dict(x=x, weight=weight, y=y))
    return y


@conv2d.register_fake
def _(x: Tensor, weight: Tensor, stride: int, padding: int, *_: bool) -> Tensor:
    return empty_images(x, len(weight), shape_of(x, weight, stride, padding).sides)


@torch.library.custom_op("mnclglf::cudnn_conv2d_backward", mutates_args=())
def conv2d_backward(
    upstream: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    half_sums: bool,
    of_x: bool,
    of_weight: bool,
) -> list[Tensor]:
    """Returns the gradients of x and of weight that are asked for; only that of x is ever summed in fp16."""
    question = Question(shape_of(x, weight, stride, padding), x.dtype, half_sums=True, gradient=True)
    plan = plan_of(question, x.device) if half_sums and of_x else None
    settings = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [of_x and plan is None, of_weight, False]
    x, weight, upstream = dense(x), dense(weight), dense(upstream)
    gradients = list(torch.ops.aten.convolution_backward(upstream, x, weight, None, *settings)[:2])
    if plan is not None:
        gradients[0] = empty_images(x, x.shape[1], (x.shape[2], x.shape[3]))
        plan.run(x.device, dict(upstream=upstream, weight=weight, gradient=gradients[0]))
    wanted = zip(gradients, (of_x, of_weight), strict=True)
    return [gradient.contiguous(memory_format=torch.channels_last) for gradient, asked in wanted if asked]


@conv2d_backward.register_fake
def _(
    upstream: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, half: bool, of_x: bool, of_weight: bool
) -> list[Tensor]:
    wanted = zip((x, weight), (of_x, of_weight), strict=True)
    return [empty_images(like, like.shape[1], (like.shape[2], like.shape[3])) for like, asked in wanted if asked]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.settings, _, ctx.half_sums = inputs
    ctx.save_for_backward(x, weight)


def _gradient(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    asked = ctx.needs_input_grad[:2]
    found = iter(conv2d_backward(upstream, *ctx.saved_tensors, *ctx.settings, ctx.half_sums, *asked))
    return *(next(found) if wanted else None for wanted in asked), None, None, None, None


conv2d.register_autograd(_gradient, setup_context=_setup)
