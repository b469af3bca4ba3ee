"""The contrastive loss: one pair, the four of a step in one call, and smaller ones.

S subsets, N images, D embedding width.
"""

from __future__ import annotations

import torch
from oracles import Algorithm1AsPrinted

from bench.side_by_side import BOTH, DEVICE, DIRECTIONS, Case, Direction, Implementation, Work, by_implementation
from mnclglf.recipes import paper
from mnclglf_kernels import contrastive_losses

TEMPERATURE = paper("mnclglf", "cifar10").objective.temperature
STEP = (6, 6, 1, 1)  # S of c1, c3, n1 and n2
VIEWS = (2, 0, 1, 0)  # which view's predictions each of them meets: p3, p1, p2, p1


def contrastive_case(
    direction: Direction, *, subsets: tuple[int, ...], images: int, width: int, both_sides: bool = False
) -> Case:
    """One pair for each of `subsets`. In the step a gradient reaches the predictions only."""

    def make(implementation: Implementation) -> Work:
        def embeddings(count: int, *, gradient: bool) -> torch.Tensor:
            return torch.randn(count, width, device=DEVICE).to(implementation.dtype).requires_grad_(gradient)

        views = VIEWS[: len(subsets)]
        targets = [embeddings(s * images, gradient=both_sides) for s in subsets]
        predictions = {view: embeddings(images, gradient=True) for view in sorted(set(views))}
        pairs = [(h, predictions[view]) for h, view in zip(targets, views, strict=True)]
        leaves = [*predictions.values(), *(targets if both_sides else [])]
        if implementation.backend == "reference":
            return Work(lambda: [Algorithm1AsPrinted.contrastive_loss(h, p, TEMPERATURE) for h, p in pairs], leaves)
        return Work(lambda: contrastive_losses(pairs, TEMPERATURE, backend=implementation.backend), leaves)

    shape = f"S {' + '.join(map(str, subsets))}, N {images}, D {width}"
    if both_sides:
        shape += ", both sides' gradients"
    return Case("contrastive", shape, direction, "matmul", make)


SMALL = [((s,), n, d) for d in (512, 2048) for n in (64, 128) for s in (1, 6)]
CASES = [
    *(contrastive_case(direction, subsets=(6,), images=256, width=2048) for direction in DIRECTIONS),
    *(contrastive_case(direction, subsets=STEP, images=256, width=2048) for direction in DIRECTIONS),
    contrastive_case(BOTH, subsets=(6,), images=256, width=2048, both_sides=True),
    *(contrastive_case(BOTH, subsets=s, images=n, width=d) for s, n, d in SMALL),
]


@by_implementation(CASES)
def test_contrastive(case, implementation, side_by_side) -> None:
    side_by_side(case, implementation)
