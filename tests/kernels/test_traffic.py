"""Bytes and launches: the closed forms against what the interpreter counts, and ours against eager PyTorch."""

import pytest
import torch
from eager import Eager
from interpreter import counting
from oracles import Algorithm1AsPrinted as reference
from torch import Tensor

from mnclglf_kernels._triton import contrastive, launch, neighbor, patches, queue
from mnclglf_kernels._triton.tiles import Tile
from mnclglf_kernels.inspect import launches
from mnclglf_kernels.sizes import OPERATORS, PAPER
from mnclglf_kernels._triton.traffic import traffic

TILES = [Tile(16, 32, 16, 4, 2), Tile(32, 16, 32, 4, 2)]
ELEMENTWISE = {"divide_kernel", "combine_kernel", "enqueue_kernel"}


def divide_launches() -> list[launch.Launch]:
    found = []
    for shape in ((3, 3, 8, 8), (5, 2, 6, 4)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            images = torch.randn(shape).contiguous(memory_format=memory_format)
            divided = patches.empty_patches(images)
            found += [x for b in (False, True) for x in patches.divide_launches(images, divided, backward=b)]
    return found


def combine_launches() -> list[launch.Launch]:
    found = []
    for k in (1, 2, 3, 4):
        features = torch.randn(20, 13).half()
        combined = patches.empty_combined(features, k)
        found += [x for b in (False, True) for x in patches.combine_launches(features, combined, k, backward=b)]
    return found


def enqueue_launches() -> list[launch.Launch]:
    found = []
    for keep in (None, torch.tensor(True)):
        found += queue.enqueue_launches(torch.randn(17, 9).half(), torch.tensor(14), torch.randn(6, 9), keep)
    return found


def neighbor_launches() -> list[launch.Launch]:
    found = []
    for t in TILES:
        for queries, size, width in ((5, 40, 16), (33, 150, 21)):
            rows, keys = torch.randn(queries, width), torch.randn(size, width)
            found += neighbor.neighbor_launches(rows, keys, neighbor.empty_nearest(rows, keys), t)
    return found


def contrastive_launches() -> list[launch.Launch]:
    found = []
    for dtype in (torch.float32, torch.float16):
        for n, d, subsets in ((7, 16, (1,)), (20, 37, (3, 1, 2))):
            targets = [torch.randn(s * n, d).to(dtype) for s in subsets]
            predictions = [torch.randn(n, d).to(dtype) for _ in subsets]
            results = contrastive.empty_forward(targets, predictions, 1.0)
            gradients = [[torch.empty_like(x) for x in side] for side in (targets, predictions)]
            for t in TILES:
                found += contrastive.forward_launches(targets, predictions, 1.0, results, t)
                shared = (targets, predictions, 1.0, results, torch.ones(len(subsets)))
                found += contrastive.backward_launches(*shared, *gradients, t, t)
    return found


@pytest.mark.parametrize(
    "make", [divide_launches, combine_launches, enqueue_launches, neighbor_launches, contrastive_launches]
)
def test_the_closed_form_is_what_the_interpreter_counts(make):
    for x in make():
        with counting() as counted:
            launch.run([x], torch.device("cpu"))
        expected = traffic(x)
        shown = {name: value for name, value in x.arguments.items() if isinstance(value, (int, tuple))}
        assert counted.issued_bytes == expected.issued_bytes, (x.kernel.__name__, shown)
        assert counted.unique_bytes == expected.unique_bytes, (x.kernel.__name__, shown)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elementwise_kernels_issue_what_they_must(dtype):
    for op in OPERATORS:
        for x in launches(op, dtype, 86):
            if x.kernel.__name__ in ELEMENTWISE:
                moved = traffic(x)
                assert moved.issued_bytes <= 1.05 * moved.unique_bytes, x.kernel.__name__


def on_meta(*shape: int, dtype: torch.dtype, gradient: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=gradient)


def eager(op: str, dtype: torch.dtype) -> Eager:
    """The reference's launches and bytes of one operator in a step of the paper's sizes, forward and backward."""
    n, side, features, k, width, size = PAPER
    with Eager() as counted:
        if op == "divide":
            images = on_meta(n, 3, side, side, dtype=dtype, gradient=True)
            divided = reference.divide(images.contiguous(memory_format=torch.channels_last))
            divided.backward(torch.empty_like(divided))
        elif op == "combine":
            combined = reference.combine(on_meta(4 * n, features, dtype=dtype, gradient=True), k)
            combined.backward(torch.empty_like(combined))
        elif op == "nearest_neighbor":
            for _ in range(2):
                reference.nearest_neighbor(on_meta(n, width, dtype=dtype), on_meta(size, width, dtype=dtype))
        elif op == "enqueue":
            reference.enqueue(on_meta(size, width, dtype=dtype), 100, on_meta(n, width, dtype=dtype))
        else:
            for subsets in (6, 6, 1, 1):
                predictions = on_meta(n, width, dtype=dtype, gradient=True)
                loss = reference.contrastive_loss(on_meta(subsets * n, width, dtype=dtype), predictions, 1.0)
                loss.backward(on_meta(dtype=dtype))
    return counted


def ours(op: str, dtype: torch.dtype) -> list[launch.Launch]:
    """Ours of the same work: of the loss, only the predictions' gradient, as in a step."""
    found = launches(op, dtype, 86)
    return [x for x in found if not x.arguments.get("OF_TARGETS")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_s_operators_launch_and_move_a_fraction_of_eager_pytorch(dtype):
    launched, moved, eager_launched, eager_moved = 0, 0, 0, 0
    for op in OPERATORS:
        mine, theirs = ours(op, dtype), eager(op, dtype)
        unique = sum(traffic(x).unique_bytes for x in mine)
        print(
            f"{op:18} {dtype} launches {len(mine):3} eager {theirs.launches:4}   "
            f"MB {unique / 1e6:7.1f} eager {theirs.unique_bytes / 1e6:7.1f}"
        )
        launched, moved = launched + len(mine), moved + unique
        eager_launched, eager_moved = eager_launched + theirs.launches, eager_moved + theirs.unique_bytes
    print(f"together launches {launched} {eager_launched} MB {moved / 1e6:.1f} {eager_moved / 1e6:.1f}")
    assert eager_launched >= 4 * launched
    assert eager_moved >= 3 * moved
