"""MoCo's loss against a queue, beside its Algorithm 1. N queries, K queue rows, D embedding width."""

from __future__ import annotations

import torch
from method_oracles import queue_loss_as_published
from torch.nn import functional

from bench.side_by_side import BOTH, DEVICE, DIRECTIONS, Case, Direction, Implementation, Work, by_implementation
from mnclglf.recipes import paper
from mnclglf_kernels import queue_contrastive_loss

TEMPERATURE = paper("mocov2", "cifar10").objective.temperature


def queue_case(direction: Direction, *, images: int, size: int, width: int) -> Case:
    """A gradient reaches the queries only, as in a step."""

    def make(implementation: Implementation) -> Work:
        queries, keys = (torch.randn(images, width, device=DEVICE).to(implementation.dtype) for _ in range(2))
        queue = functional.normalize(torch.randn(size, width, device=DEVICE)).to(implementation.dtype)
        given = (queries.requires_grad_(), keys, queue, TEMPERATURE)
        if implementation.backend == "reference":
            return Work(lambda: [queue_loss_as_published(*given)], [queries])
        return Work(lambda: [queue_contrastive_loss(*given, backend=implementation.backend)], [queries])

    return Case("queue contrastive", f"N {images}, K {size}, D {width}", direction, "matmul", make)


CASES = [
    *(queue_case(direction, images=256, size=16384, width=2048) for direction in DIRECTIONS),
    *(queue_case(BOTH, images=64, size=size, width=512) for size in (4096, 16384)),
]


@by_implementation(CASES)
def test_queue_contrastive(case, implementation, side_by_side) -> None:
    side_by_side(case, implementation)
