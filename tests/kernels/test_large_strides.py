"""Tests of strides whose product with a row number exceeds int32, over memory with only a few touched pages."""

import mmap

import numpy as np
import oracles
import pytest
import torch
from tolerance import assert_nearest
from torch import Tensor
from torch.nn import functional as F

from mnclglf_kernels import augment, batch_norm, combine, divide, enqueue, nearest_neighbor
from mnclglf_kernels.ops.augment import ViewFormat, view_parameters

LIMIT = 2**31
MAP_NORESERVE = 0x4000  # Linux's value; Python has the name since 3.13


@pytest.fixture(scope="module")
def far() -> Tensor:
    """Returns more than 2 * LIMIT fp16 elements, which take memory only where they are touched.

    Tests start at element LIMIT, so that an offset that wraps to a negative number reads zeros and does not crash.
    """
    size = 2 * (2 * LIMIT + 2**20)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.from_numpy(np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=np.float16))


def place(x: Tensor, far: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Returns a copy of x with these strides, which starts in the middle of `far`."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    assert last >= LIMIT
    return torch.as_strided(far, x.shape, strides, LIMIT).copy_(x)


def test_only_what_is_touched_takes_memory(far, backend):
    def resident_bytes() -> int:
        with open("/proc/self/statm") as statistics:
            return int(statistics.read().split()[1]) * mmap.PAGESIZE

    before = resident_bytes()
    queue = place(torch.randn(2, 7).half(), far, (LIMIT, 1))
    nearest_neighbor(torch.randn(3, 7).half(), queue, backend=backend)
    enqueue(queue, torch.tensor(1), torch.randn(2, 7), backend=backend)
    assert resident_bytes() - before < 2**28  # 256 MiB of the 8 GiB


@pytest.mark.parametrize(
    "strides",
    [(LIMIT, 16, 4, 1), (16, LIMIT, 4, 1), (64, 16, LIMIT // 3 + 1, 1), (64, 16, 1, LIMIT // 3 + 1)],
    ids=["images", "channels", "rows", "columns"],
)
def test_divide(strides, far, backend):
    sizes = [2 if stride == LIMIT else 1 for stride in strides[:2]]
    x = torch.randn(*sizes, 4, 4).half()
    assert torch.equal(divide(place(x, far, strides), backend=backend), oracles.divide(x))


@pytest.mark.parametrize(
    "strides",
    [(2 * LIMIT - 2**20, 64, 8, 1), (64, LIMIT, 8, 1), (512, 64, LIMIT // 7 + 1, 1), (512, 64, 1, LIMIT // 7 + 1)],
    ids=["images", "channels", "rows", "columns"],
)
def test_augment(strides, far, backend):
    images = torch.randint(1, 256, (2 if strides[0] > LIMIT else 1, 3, 8, 8), dtype=torch.uint8)
    numbers = view_parameters(8, 8)
    given = torch.tensor([len(images) - 1]), numbers, torch.zeros(3), torch.ones(3), ViewFormat(8)
    spread = place(images, far.view(torch.uint8), strides)
    assert torch.equal(augment(spread, *given, backend=backend), augment(images, *given, backend=backend))


@pytest.mark.parametrize("strides", [(LIMIT // 3 + 1, 1), (1, LIMIT // 2)], ids=["rows", "columns"])
def test_combine(strides, far, backend):
    features = torch.randn(4, 3).half()
    expected = combine(features, 2, backend=backend)
    assert torch.equal(combine(place(features, far, strides), 2, backend=backend), expected)


@pytest.mark.parametrize("strides", [(LIMIT // 11 + 1, 1), (1, LIMIT // 2)], ids=["rows", "columns"])
def test_combine_gradient(strides, far, backend):
    leaf = torch.randn(8, 3).half().requires_grad_()
    combined = combine(leaf, 2, backend=backend)
    upstream = torch.randn_like(combined)
    (expected,) = torch.autograd.grad(combined, leaf, upstream, retain_graph=True)
    (gradient,) = torch.autograd.grad(combined, leaf, place(upstream, far, strides))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("strides", [(LIMIT // 3 + 1, 1), (1, LIMIT // 2)], ids=["rows", "columns"])
def test_batch_norm(strides, far, backend):
    x, vectors = torch.randn(4, 3).half(), torch.rand(2, 3)
    expected = batch_norm(x, *vectors, views=2, backend=backend)
    assert torch.equal(batch_norm(place(x, far, strides), *vectors, views=2, backend=backend), expected)
    residual = place(torch.randn(4, 3).half(), far, strides)
    near = batch_norm(x, *vectors, residual=residual.clone(), backend=backend)
    assert torch.equal(batch_norm(x, *vectors, residual=residual, backend=backend), near)


@pytest.mark.parametrize("strides", [(LIMIT // 2, 1), (1, LIMIT // 6 + 1)], ids=["rows", "columns"])
@pytest.mark.parametrize("side", ["queries", "queue"])
def test_nearest_neighbor(side, strides, far, backend):
    queries, queue = torch.randn(3, 7).half(), F.normalize(torch.randn(3, 7)).half()
    if side == "queries":
        index = nearest_neighbor(place(queries, far, strides), queue, backend=backend)
    else:
        index = nearest_neighbor(queries, place(queue, far, strides), backend=backend)
    assert_nearest(index, queries, queue)


@pytest.mark.parametrize("strides", [(LIMIT // 4 + 1, 1), (1, LIMIT // 6 + 1)], ids=["rows", "columns"])
@pytest.mark.parametrize("side", ["queue", "rows"])
def test_enqueue(side, strides, far, backend):
    queue, rows = torch.randn(5, 7).half(), torch.randn(5, 7).half()
    expected, _ = oracles.enqueue(queue.double(), 3, rows.double())
    if side == "queue":
        queue = place(queue, far, strides)
    else:
        rows = place(rows, far, strides)
    pointer = torch.tensor(3)
    enqueue(queue, pointer, rows, backend=backend)
    assert pointer.item() == 3
    torch.testing.assert_close(queue.double(), expected, rtol=2**-10, atol=2**-24)  # one rounding to fp16
