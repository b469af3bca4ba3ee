"""combine: the means of every k of the four patches' features."""

from __future__ import annotations

import torch
from oracles import Algorithm1AsPrinted

from bench.side_by_side import DEVICE, DIRECTIONS, Case, Direction, Implementation, Work, by_implementation
from mnclglf_kernels import combine


def combine_case(direction: Direction, *, images: int = 256, width: int = 512, k: int = 2) -> Case:
    def make(implementation: Implementation) -> Work:
        features = torch.randn(4 * images, width, device=DEVICE).to(implementation.dtype)
        features.requires_grad_(direction != "forward")  # the step combines without a gradient
        if implementation.backend == "reference":
            return Work(lambda: [Algorithm1AsPrinted.combine(features, k)], [features])
        return Work(lambda: [combine(features, k, backend=implementation.backend)], [features])

    return Case("combine", f"N {images}, F {width}, k {k}", direction, "elementwise", make)


@by_implementation([combine_case(direction) for direction in DIRECTIONS])
def test_combine(case, implementation, side_by_side) -> None:
    side_by_side(case, implementation)
