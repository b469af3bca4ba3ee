"""divide: the 2 x 2 division of a batch of images."""

from __future__ import annotations

import torch
from oracles import Algorithm1AsPrinted

from bench.side_by_side import DEVICE, DIRECTIONS, Case, Direction, Implementation, Work, by_implementation
from mnclglf_kernels import divide


def divide_case(direction: Direction, *, images: int = 256, side: int = 32) -> Case:
    def make(implementation: Implementation) -> Work:
        x = torch.randn(images, 3, side, side, device=DEVICE)
        x = x.to(implementation.dtype, memory_format=torch.channels_last)
        x.requires_grad_(direction != "forward")  # the step divides without a gradient
        if implementation.backend == "reference":
            return Work(lambda: [Algorithm1AsPrinted.divide(x)], [x])
        return Work(lambda: [divide(x, backend=implementation.backend)], [x])

    return Case("divide", f"N {images}, {side} x {side}", direction, "elementwise", make)


@by_implementation([divide_case(direction) for direction in DIRECTIONS])
def test_divide(case, implementation, side_by_side) -> None:
    side_by_side(case, implementation)
