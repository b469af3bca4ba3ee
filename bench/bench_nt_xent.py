"""NT-Xent, SimCLR's loss of two views, beside its authors' form. N images, D embedding width."""

from __future__ import annotations

import torch
from method_oracles import nt_xent_as_published

from bench.side_by_side import BOTH, DEVICE, DIRECTIONS, Case, Direction, Implementation, Work, by_implementation
from mnclglf.recipes import paper
from mnclglf_kernels import nt_xent

TEMPERATURE = paper("simclr", "cifar10").objective.temperature


def nt_xent_case(direction: Direction, *, images: int, width: int) -> Case:
    def make(implementation: Implementation) -> Work:
        first, second = (
            torch.randn(images, width, device=DEVICE).to(implementation.dtype).requires_grad_() for _ in range(2)
        )
        if implementation.backend == "reference":
            return Work(lambda: [nt_xent_as_published(first, second, TEMPERATURE)], [first, second])
        return Work(lambda: [nt_xent(first, second, TEMPERATURE, backend=implementation.backend)], [first, second])

    return Case("nt_xent", f"N {images}, D {width}", direction, "matmul", make)


CASES = [
    *(nt_xent_case(direction, images=256, width=2048) for direction in DIRECTIONS),
    *(nt_xent_case(BOTH, images=n, width=d) for d in (512, 2048) for n in (64, 128)),
]


@by_implementation(CASES)
def test_nt_xent(case, implementation, side_by_side) -> None:
    side_by_side(case, implementation)
