"""Tensors with equal values and different strides."""

import torch
from torch import Tensor

LAYOUTS = ["contiguous", "transposed", "every second column", "every second row", "offset by one"]


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Returns a tensor equal to x [M, D] in the named memory layout; the gaps of a strided one hold NaN."""
    rows, columns = x.shape
    if layout == "contiguous":
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "transposed":
        return x.t().clone(memory_format=torch.contiguous_format).t()
    if layout == "every second column":
        strided = x.new_full((rows, 2 * columns), torch.nan)[:, ::2]
    elif layout == "every second row":
        strided = x.new_full((2 * rows, columns), torch.nan)[::2]
    elif layout == "offset by one":
        strided = x.new_full((rows * columns + 1,), torch.nan)[1:].view(rows, columns)
    else:
        raise ValueError(f"layout {layout!r} is not one of {LAYOUTS}")
    return strided.copy_(x)
