"""The nearest-neighbor lookup of a step: the queries of two views.

Algorithm 1 looks each view up by itself and normalises the queue both times; ours concatenates the views.
"""

from __future__ import annotations

import torch
from oracles import Algorithm1AsPrinted
from torch.nn import functional

from bench.side_by_side import DEVICE, Case, Implementation, Work, by_implementation
from mnclglf_kernels import nearest_neighbor


def neighbor_case(*, queries: int, size: int, width: int) -> Case:
    def make(implementation: Implementation) -> Work:
        queue = functional.normalize(torch.randn(size, width, device=DEVICE)).to(implementation.dtype)
        views = [torch.randn(queries, width, device=DEVICE).to(implementation.dtype) for _ in range(2)]
        if implementation.backend == "reference":
            return Work(lambda: [Algorithm1AsPrinted.nearest_neighbor(z, queue) for z in views])
        return Work(lambda: [nearest_neighbor(torch.cat(views), queue, backend=implementation.backend)])

    return Case("nearest neighbor", f"2 x {queries} in {size} x {width}", "forward", "lookup", make)


@by_implementation(
    [neighbor_case(queries=256, size=16384, width=2048), neighbor_case(queries=64, size=4096, width=512)]
)
def test_nearest_neighbor(case, implementation, side_by_side) -> None:
    side_by_side(case, implementation)
