"""enqueue: a batch of embeddings over the queue's oldest rows; ours with the step's gate, which Algorithm 1 lacks."""

from __future__ import annotations

import torch
from oracles import Algorithm1AsPrinted
from torch import Tensor

from bench.side_by_side import DEVICE, Case, Implementation, Work, by_implementation
from mnclglf_kernels import enqueue


def enqueue_case(*, images: int = 256, size: int = 16384, width: int = 2048) -> Case:
    def make(implementation: Implementation) -> Work:
        queue = torch.zeros(size, width, dtype=implementation.dtype, device=DEVICE)
        batch = torch.randn(images, width, device=DEVICE).to(implementation.dtype)
        pointer, keep = torch.zeros((), dtype=torch.int64, device=DEVICE), torch.tensor(True, device=DEVICE)
        oldest = 0

        def reference() -> list[Tensor]:
            nonlocal oldest
            _, oldest = Algorithm1AsPrinted.enqueue(queue, oldest, batch)
            return [queue]

        def ours() -> list[Tensor]:
            enqueue(queue, pointer, batch, should_update=keep, backend=implementation.backend)
            return [queue]

        return Work(reference if implementation.backend == "reference" else ours)

    return Case("enqueue", f"{images} rows into {size} x {width}", "forward", "elementwise", make)


@by_implementation([enqueue_case()])
def test_enqueue(case, implementation, side_by_side) -> None:
    side_by_side(case, implementation)
