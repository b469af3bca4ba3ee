"""convolution: the batch norm before a convolution, the convolution, and the moments for the batch norm after it.

For networks without gradient. Letters: V views, N images per view, C channels of x, K channels of y, T taps per side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mnclglf_kernels.backend import Backend, cudnn_problem, resolve
from mnclglf_kernels.checks import check_floating

MULTIPLE = 16  # of channels: the least that a tensor core multiplies
LARGEST = 2**31  # elements of a view: the Triton kernel has 32-bit offsets within one


class Convolved(NamedTuple):
    """Result of `convolution`."""

    y: Tensor
    mean: Tensor
    var: Tensor


def convolution(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    views: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    half_sums: bool = False,
    backend: Backend = "auto",
) -> Convolved:
    """Convolves x, or relu(x * scale + shift), and returns the moments of the result per view and channel.

    A batch holds its V views one after the other, N images each. Where scale and shift are given, the convolution reads
    relu(x * scale + shift), computed in fp32 and rounded to x's dtype; the padding is zero after that. NaN stays NaN,
    except that cuDNN's ReLU may make it 0: an overflow before it still shows in the moments that gave scale and shift.

    Args:
        x: [V * N, C, H, W].
        weight: [K, C, T, T] in x's dtype.
        stride: step of the filter.
        padding: rows and columns of zeros on each side.
        views: V.
        scale: [V, C] fp32 (fp64 for fp64), or None with `shift`.
        shift: [V, C] of scale's dtype.
        half_sums: true to sum the products in fp16, at twice the rate on a GeForce. Only cuDNN does, and only for fp16;
            all else sums in fp32 and ignores it.
        backend: see `resolve`; "auto" is "torch". "triton" has a kernel for 3 x 3, stride 1, padding 1, and multiples
            of 16 channels. "cudnn" has plans for most shapes on most GPUs. Where they have none, they run the PyTorch
            form.

    Returns:
        y, [V * N, K, H', W'] in x's dtype, channels_last from Triton and cuDNN; mean and biased variance of y, [V, K]
        fp32 (fp64 for fp64). Triton takes them from the sums before they are rounded to x's dtype, the PyTorch form
        from y after that. cuDNN's own moments, which it has for fp16 with fp32 sums, are a sum and a sum of squares:
        where a mean is large against its deviation, the variance loses digits. Otherwise cuDNN's are of y.

    Raises:
        ValueError: shapes do not fit.
        TypeError: a dtype does not fit.
        RuntimeError: a gradient is asked for, or the backend cannot run here.
    """
    tensors = [t for t in (x, weight, scale, shift) if t is not None]
    check_operands(x, weight, stride, padding)
    check_views(x, views, scale=scale, shift=shift)
    check_no_gradient(x=x, weight=weight, scale=scale, shift=shift)
    resolved = resolve(backend, *tensors, kind="convolution")
    if resolved == "triton" and has_triton_kernel(x, weight, stride, padding, views):
        return Convolved(*torch.ops.mnclglf.convolution(x, weight, scale, shift, views))
    if resolved == "cudnn":
        operands = x, weight, scale, shift, stride, padding, views, half_sums
        return Convolved(*torch.ops.mnclglf.cudnn_convolution(*operands))
    return torch_convolution(x, weight, stride, padding, views, scale, shift)


def conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    half_sums_forward: bool = False,
    half_sums_input_gradient: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Convolves x; cuDNN may sum the products of this, and of the gradient of x, in fp16.

    On a GeForce that is twice the rate. The gradient of the weights sums over all images and pixels, always in fp32.

    Args:
        x: [N, C, H, W].
        weight: [K, C, T, T] in x's dtype.
        stride: step of the filter.
        padding: rows and columns of zeros on each side.
        half_sums_forward: true to sum the result in fp16, where x is fp16 and cuDNN can.
        half_sums_input_gradient: true to sum the gradient of x in fp16, where x is fp16 and cuDNN can.
        backend: see `resolve`. "auto" is "cudnn" with one of the switches, where it can run, else "torch". "triton" has
            no kernel for this and is "torch".

    Returns:
        [N, K, H', W'] in x's dtype. Differentiable with respect to x and weight.

    Raises:
        ValueError: shapes do not fit.
        TypeError: a dtype does not fit.
        RuntimeError: the backend cannot run here.
    """
    check_operands(x, weight, stride, padding)
    resolved = resolve(backend, x, weight, kind="convolution")
    switches = (half_sums_forward, half_sums_input_gradient)
    if backend == "auto" and any(switches) and cudnn_problem(x.device, x.dtype) is None:
        resolved = "cudnn"
    if resolved == "cudnn" and x.dtype == torch.float16 and any(switches):
        return torch.ops.mnclglf.cudnn_conv2d(x, weight, stride, padding, *switches)
    return F.conv2d(x, weight, stride=stride, padding=padding)


def check_operands(x: Tensor, weight: Tensor, stride: int, padding: int) -> None:
    """Raises ValueError or TypeError unless the filters fit the images."""
    check_floating("x", x)
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [V * N, C, H, W], without a 0")
    if weight.dim() != 4 or 0 in weight.shape or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [K, C, T, T], without a 0")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight takes {weight.shape[1]} channels, x has {x.shape[1]}; they must agree")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight is {weight.dtype}, x {x.dtype}; they must agree")
    if stride < 1 or padding < 0:
        raise ValueError(f"stride {stride} must be positive, and padding {padding} not negative")
    if min(x.shape[2:]) + 2 * padding < weight.shape[2]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} with padding {padding} is smaller than the filter, {weight.shape[2]} taps"
        )


def check_views(x: Tensor, views: int, **vectors: Tensor | None) -> None:
    """Raises ValueError or TypeError unless x holds whole views, and both vectors are [V, C] or both None."""
    if views < 1 or len(x) % views:
        raise ValueError(f"views {views} do not divide a batch of {len(x)}; a batch holds whole views")
    missing = [name for name, vector in vectors.items() if vector is None]
    if len(missing) == 1:
        raise ValueError(f"{missing[0]} is None and the other is not; give both scale and shift or neither")
    dtype = torch.promote_types(x.dtype, torch.float32)
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != (views, x.shape[1]):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; it must be [V, C], {(views, x.shape[1])}")
        if vector.dtype != dtype:
            raise TypeError(f"{name} is {vector.dtype}; for x in {x.dtype} it must be {dtype}")


def check_no_gradient(**tensors: Tensor | None) -> None:
    """Raises RuntimeError if a gradient is asked for."""
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise RuntimeError(f"{name} requires a gradient, and convolution has none; call it under torch.no_grad()")


def has_triton_kernel(x: Tensor, weight: Tensor, stride: int, padding: int, views: int) -> bool:
    """Returns whether the Triton kernel computes this convolution."""
    (outputs, inputs, taps, _), pixels = weight.shape, x[:, 0].numel() // views
    fits = inputs % MULTIPLE == outputs % MULTIPLE == 0 and pixels * max(inputs, outputs) < LARGEST
    return (taps, stride, padding) == (3, 1, 1) and fits


def torch_convolution(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    views: int,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Convolved:
    """Computes convolution with torch's own."""
    device = "cpu" if x.is_meta else x.device.type  # there is no autocast for meta
    with torch.autocast(device, enabled=False):
        if scale is not None and shift is not None:
            x = normalized(x, scale, shift)
        y = F.conv2d(x, weight, stride=stride, padding=padding)
    return Convolved(y, *moments(y, views))


def normalized(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Returns relu(x * scale + shift) in x's dtype, from scale and shift per view."""
    return F.relu(scaled(x, scale, shift)).to(x.dtype)


def scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Returns x * scale + shift of each view, [V * N, C, H, W] in the dtype of scale."""
    slope, offset = (t[:, None, :, None, None] for t in (scale, shift))
    return (x.unflatten(0, (len(scale), -1)).to(scale.dtype) * slope + offset).flatten(0, 1)


def moments(y: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Returns mean and biased variance of each view and channel, in fp32 (fp64 for fp64)."""
    wide = y.unflatten(0, (views, -1)).to(torch.promote_types(y.dtype, torch.float32))
    var, mean = torch.var_mean(wide, dim=(1, 3, 4), correction=0)
    return mean, var
