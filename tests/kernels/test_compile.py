"""Tests of each operator under torch.compile(fullgraph=True), forward and backward, against eager mode."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mnclglf_kernels import (
    Backend,
    augment,
    combine,
    contrastive_loss,
    contrastive_losses,
    divide,
    enqueue,
    nearest_neighbor,
    nt_xent,
    queue_contrastive_loss,
)
from mnclglf_kernels.ops.augment import ViewFormat, view_parameters

NAMES = (
    "divide",
    "combine",
    "contrastive_loss",
    "contrastive_losses",
    "nearest_neighbor",
    "nt_xent",
    "queue_contrastive_loss",
)
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
FP32: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)  # a compiler may fuse and reorder fp32 sums of up to 60 terms
# One unit in the last place of bf16 at 1.0 and at 0.5: a product may round differently.
BF16: dict[str, Any] = dict(rtol=2**-7, atol=2**-8)

CHANGES = dict(flip=1, brightness=1.2, contrast=0.8, saturation=1.1, hue=0.1, sigma=1, solarize=1)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_filled() -> None:
    """Overrides the fixture of conftest.py: deterministic algorithms would change the code that Inductor generates."""


def operators(images: Tensor, weight: Tensor, queue: Tensor, backend: Backend) -> dict[str, Tensor]:
    """Returns a scalar of each operator by name. It is one function because each graph costs Inductor seconds."""
    rows = images.flatten(1) @ weight
    index = nearest_neighbor(rows, queue, backend=backend)
    pairs = [(rows.repeat(2, 1) + 1, rows), (queue[index], rows), (rows[:2] + 1, rows[2:4])]
    first, second, third = contrastive_losses(pairs, 0.5, backend=backend)
    return {
        "divide": (divide(images, backend=backend).flatten(1) @ weight[:8]).square().sum(),
        "combine": combine(rows[:4], 2, backend=backend).square().sum(),
        "contrastive_loss": contrastive_loss(rows.repeat(3, 1) + 1, rows, 0.5, backend=backend),
        "contrastive_losses": first - 2 * second + 3 * third,
        "nearest_neighbor": (queue[index] * rows).sum(),
        "nt_xent": nt_xent(rows + 1, rows.flip(0), 0.5, backend=backend),
        "queue_contrastive_loss": queue_contrastive_loss(rows, rows + 1, queue, 0.5, backend=backend),
    }


def with_gradients(function, name: str, backend: Backend, autocast: bool) -> tuple[Tensor, ...]:
    """Returns (result, gradient of images, gradient of weight) of one operator, on the same numbers each time."""
    torch.manual_seed(5)
    images, weight, queue = torch.randn(5, 2, 4, 4), torch.randn(32, 7), F.normalize(torch.randn(17, 7))
    leaves = images.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = function(*leaves, queue, backend)[name]
    result.backward()
    assert images.grad is not None
    assert weight.grad is not None
    return result.detach(), images.grad, weight.grad


@pytest.mark.parametrize(
    ("compiler", "autocast"),
    [
        ("aot_eager", False),
        pytest.param("inductor", False, marks=pytest.mark.slow),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
    ids=["aot_eager", "inductor", "inductor under bf16 autocast"],
)
def test_forward_and_backward(compiler, autocast, backend):
    torch._dynamo.reset()
    compiled = torch.compile(operators, fullgraph=True, backend=compiler)
    for name in NAMES:
        expected = with_gradients(operators, name, backend, autocast)
        for result, reference in zip(with_gradients(compiled, name, backend, autocast), expected, strict=True):
            torch.testing.assert_close(
                result, reference, **(BF16 if autocast else FP32), msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("keep", [None, True, False], ids=str)
def test_enqueue(keep, compiler, backend):
    torch._dynamo.reset()
    gate = None if keep is None else torch.tensor(keep)
    queue, rows = F.normalize(torch.randn(17, 6)), torch.randn(5, 6)
    results = []
    for write in (enqueue, torch.compile(enqueue, fullgraph=True, backend=compiler)):
        ring, pointer = queue.clone(), torch.tensor(15)
        for _ in range(2):
            write(ring, pointer, rows, should_update=gate, backend=backend)
        results.append((ring, pointer))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, **FP32)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("lookup", ["torch", "triton", "faiss"])
def test_lookup_of_every_backend(lookup, compiler, monkeypatch):
    torch._dynamo.reset()
    queue, queries = F.normalize(torch.randn(65, 7)), torch.randn(9, 7)
    compiled = torch.compile(nearest_neighbor, fullgraph=True, backend=compiler)
    expected = nearest_neighbor(queries, queue, backend="torch")
    assert torch.equal(compiled(queries, queue, backend=lookup), expected)
    if lookup == "torch":  # the path of a CPU without bf16 products
        torch._dynamo.reset()
        monkeypatch.setattr("mnclglf_kernels.ops.nearest_neighbor.CPU_MULTIPLIES_BF16", False)
        monkeypatch.setattr("mnclglf_kernels.ops.nearest_neighbor.CHUNK", 16)
        assert torch.equal(compiled(queries, queue, backend=lookup), expected)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_augment(compiler, backend):
    torch._dynamo.reset()
    numbers = view_parameters(6, 7, **CHANGES, angle=10, top=1).repeat(4, 1)
    given = (
        torch.randint(256, (2, 3, 9, 8), dtype=torch.uint8),
        torch.tensor([1, 0]),
        numbers,
        torch.zeros(3),
        torch.ones(3),
    )

    def brightest(*tensors: Tensor) -> Tensor:
        return augment(*tensors, view_format=ViewFormat(6, rotates=True), backend=backend).amax((2, 3))

    compiled = torch.compile(brightest, fullgraph=True, backend=compiler)
    # A sum at a half may become another whole level, up to 3 of 255 away after the jitter.
    torch.testing.assert_close(compiled(*given), brightest(*given), rtol=0, atol=3 / 255)
