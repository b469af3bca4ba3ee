"""Tests of the closed forms of bytes and operations against the interpreter's counts."""

from functools import partial

import pytest
import torch
from interpreter import counting

from mnclglf_kernels._triton import augment, batch_norm, combine, convolution, divide, launch, nt_xent
from mnclglf_kernels._triton import contrastive_losses as contrastive
from mnclglf_kernels._triton import enqueue as queue
from mnclglf_kernels._triton import nearest_neighbor as neighbor
from mnclglf_kernels._triton import queue_contrastive_loss as queue_contrastive
from mnclglf_kernels._triton.tiles import Tile
from mnclglf_kernels.operators import OPERATORS, Example
from mnclglf_kernels.ops.augment import view_parameters
from mnclglf_kernels.sizes import Sizes

CHANGES = dict(flip=1, brightness=1.2, contrast=0.8, saturation=1.1, hue=0.1, sigma=1, solarize=1)
TILES = [Tile(16, 32, 16, 4, 2), Tile(32, 16, 32, 4, 2)]
ELEMENTWISE = {"divide_kernel", "combine_kernel", "enqueue_write_kernel"}


def filled(found: list[launch.Launch]) -> list[launch.Launch]:
    """Returns the launches with NaN in uninitialized memory replaced: the interpreter warns when it casts one."""
    for value in (value for x in found for value in x.arguments.values()):
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.nan_to_num_()
    return found


def augment_launches() -> list[launch.Launch]:
    found = []
    for (height, width, side), window in (((9, 20, 16), 5), ((16, 16, 33), 1)):
        images = torch.randint(256, (4, 3, height, width), dtype=torch.uint8)
        numbers = view_parameters(6, 7, **CHANGES, top=1, left=2).repeat(8, 1)
        given = images, torch.randperm(4), numbers, torch.zeros(3), torch.ones(3)
        views = augment.empty_views(numbers, side, torch.float16)
        found += augment.augment_launches(*given, views, cubic=True, blur_window=window, rotates=False)
    return found


def divide_launches() -> list[launch.Launch]:
    found = []
    for shape in ((3, 3, 8, 8), (5, 2, 6, 4)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            images = torch.randn(shape).contiguous(memory_format=memory_format)
            divided = divide.empty_patches(images)
            found += [x for b in (False, True) for x in divide.divide_launches(images, divided, backward=b)]
    return found


def combine_launches() -> list[launch.Launch]:
    found = []
    for k in (1, 2, 3, 4):
        features = torch.randn(20, 13).half()
        combined = combine.empty_combined(features, k)
        found += [x for b in (False, True) for x in combine.combine_launches(features, combined, k, backward=b)]
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
        for n, d, subsets, part in (
            (7, 16, (1,), contrastive.Part()),
            (20, 37, (3, 1, 2), contrastive.Part()),
            (7, 16, (1, 2), contrastive.Part(2, 3)),
        ):
            targets = [torch.randn(s * n, d).to(dtype) for s in subsets]
            predictions = [torch.randn(part.ranks * n, d).to(dtype) for _ in subsets]
            results = contrastive.empty_forward(targets, predictions, part)
            gradients = [[torch.empty_like(x) for x in side] for side in (targets, predictions)]
            for t in TILES:
                found += contrastive.forward_launches(targets, predictions, 1.0, results, t, part)
                shared = (targets, predictions, 1.0, results, torch.ones(len(subsets)))
                found += contrastive.backward_launches(*shared, *gradients, t=t, gradient_tile=t, part=part)
    return found


def nt_xent_launches() -> list[launch.Launch]:
    found = []
    for dtype in (torch.float32, torch.float16):
        for n, d, part in ((3, 16, (0, 1)), (20, 37, (0, 1)), (6, 16, (1, 2)), (63, 37, (1, 3))):
            rows = torch.randn(2 * n, d).to(dtype)
            results = nt_xent.empty_nt_xent_forward(rows, *part)
            for t in TILES:
                found += nt_xent.nt_xent_forward_launches(rows, 1.0, results, t, *part)
                gradient = torch.empty_like(rows)
                found += nt_xent.nt_xent_backward_launches(rows, 1.0, results, torch.ones(1), gradient, t, t, *part)
    return found


def queue_launches() -> list[launch.Launch]:
    found = []
    for dtype, queue_dtype in ((torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float16,) * 2):
        for n, d, k in ((5, 16, 40), (20, 37, 150)):
            queries, keys, *gradients = (torch.randn(n, d).to(dtype) for _ in range(4))
            rows, results = torch.randn(k, d).to(queue_dtype), queue_contrastive.empty_queue_forward(queries)
            for t in TILES:
                shared = (queries, keys, rows, 1.0, results)
                found += queue_contrastive.queue_forward_launches(*shared, t)
                found += queue_contrastive.queue_backward_launches(*shared, torch.ones(n), *gradients, t=t, sum_tile=t)
    return found


def batch_norm_launches() -> list[launch.Launch]:
    """Returns those of every variant, with lanes that a part does not fill and more parts than are summed at a time."""
    found = []
    for dtype, views, shape in (
        (torch.float16, 3, (6, 5, 3, 3)),
        (torch.float32, 2, (260, 123)),
        (torch.float64, 4, (8, 65)),
        (torch.float16, 1, (23, 3, 28, 28)),
    ):
        x, weight, bias, mean, variance = torch.randn(shape).to(dtype), *torch.ones(4, shape[1]).unbind()
        for residual in (None, x.clone()):
            for running in ((None, None), (mean, variance)):
                for relu in (False, True):
                    given = x, weight, bias, *running
                    for fork in (False, True):
                        found += batch_norm.launches(*given, views=views, residual=residual, relu=relu, fork=fork)
        over_ranks = batch_norm.launches(x, weight, bias, mean, variance, views=views, residual=x.clone(), ranks=3)
        over_ranks += batch_norm.launches(x, weight, bias, views=views, relu=True, ranks=3)
        found += [x for x in over_ranks if {"own", "RANKS"} & x.arguments.keys()]  # the others are those of one process
    return filled(found)


def convolution_launches() -> list[launch.Launch]:
    """Returns those with and without a prologue, with parts that are not full and more than one tile each way."""
    found = []
    for dtype, views, (n, c, k, h, w) in (
        (torch.float16, 2, (6, 32, 48, 5, 3)),
        (torch.float32, 1, (1, 16, 16, 1, 1)),
        (torch.float64, 3, (3, 48, 16, 9, 1)),
    ):
        x, weight = torch.randn(n, h, w, c).to(dtype).permute(0, 3, 1, 2), torch.randn(k, 3, 3, c).to(dtype)
        weight = weight.permute(0, 3, 1, 2)
        for vector in (None, torch.ones(views, c, dtype=torch.promote_types(dtype, torch.float32))):
            shift = None if vector is None else vector.clone()
            for t in TILES:
                results = convolution.empty_results(x, k, views)
                found += convolution.convolution_launches(x, weight, vector, shift, *results, t)
    return filled(found)


CASES = {
    "augment": augment_launches,
    "divide": divide_launches,
    "combine": combine_launches,
    "enqueue": enqueue_launches,
    "nearest_neighbor": neighbor_launches,
    "contrastive_losses": contrastive_launches,
    "nt_xent": nt_xent_launches,
    "queue_contrastive_loss": queue_launches,
    "batch_norm": batch_norm_launches,
    "convolution": convolution_launches,
}  # shapes at the edges of the tiles
SMALL = Sizes(images=6, side=8, features=12, k=2, width=20, queue=40, source=9)


def example_launches(op: str) -> list[launch.Launch]:
    """Returns the launches of the row's own example."""
    return filled(OPERATORS[op].launches(Example(sizes=SMALL, device=torch.device("cpu"))))


@pytest.mark.parametrize(
    "make",
    [*(partial(example_launches, op) for op in OPERATORS), *CASES.values()],
    ids=[*OPERATORS, *(f"{op}, edges" for op in CASES)],
)
def test_the_closed_form_is_what_the_interpreter_counts(make, monkeypatch):
    monkeypatch.setattr(queue_contrastive, "COEFFICIENTS", 20 * 64)  # slices of the queue
    for x in make():
        with counting() as counted:
            launch.run([x], torch.device("cpu"))
        expected = x.traffic
        shown = {name: value for name, value in x.arguments.items() if isinstance(value, (int, tuple))}
        assert counted.issued_bytes == expected.issued_bytes, (x.kernel.__name__, shown)
        assert counted.unique_bytes == expected.unique_bytes, (x.kernel.__name__, shown)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elementwise_kernels_issue_what_they_must(dtype):
    for row in OPERATORS.values():
        for x in row.launches(Example(dtype=dtype)):
            if x.kernel.__name__ in ELEMENTWISE:
                moved = x.traffic
                assert moved.issued_bytes <= 1.05 * moved.unique_bytes, x.kernel.__name__


def test_augment_reads_an_image_once_a_view():
    """Checks the issued bytes with blur: three views read the stored bytes three times, at most 1.5 times the total."""
    for dtype in (torch.float32, torch.bfloat16):
        (x,) = OPERATORS["augment"].launches(Example(dtype=dtype))
        assert x.arguments["WINDOW"] > 1
        assert x.traffic.issued_bytes <= 1.5 * x.traffic.unique_bytes
