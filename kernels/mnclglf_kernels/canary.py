"""Every Triton kernel once against PyTorch in fp64, at the sizes of the run that is about to start.

A kernel that was never seen on this GPU, driver or compiler proves itself before it trains anything; what it compiles
is what the run needs anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnclglf_kernels.contrastive import contrastive_losses
from mnclglf_kernels.neighbor import nearest_neighbor
from mnclglf_kernels.patches import combine, divide
from mnclglf_kernels.queue import enqueue
from mnclglf_kernels.sizes import OPERATORS, Operator, Sizes

TEMPERATURE = 0.5


def failures(sizes: Sizes, dtype: torch.dtype, queue_dtype: torch.dtype, device: torch.device) -> dict[Operator, str]:
    """What went wrong with the Triton kernels of each operator; operators in order are not in it.

    Args:
        sizes: of the run.
        dtype: of images, features and embeddings.
        queue_dtype: of the queue's rows.
        device: where to run.
    """
    found: dict[Operator, str] = {}
    for name in OPERATORS:
        generator = torch.Generator().manual_seed(0)
        try:
            problem = CHECKS[name](sizes, dtype, queue_dtype, device, generator)
        except Exception as error:  # whatever a compiler or a driver may raise
            problem = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no text'}"
            )
        if problem is not None:
            found[name] = problem
    return found


def off(name: str, actual: Tensor, truth: Tensor) -> str | None:
    """How far a result is from the fp64 truth, if that is over four roundings of its dtype at its greatest value."""
    limit = max(4 * torch.finfo(actual.dtype).eps, 1e-4) * max(truth.abs().max().item(), 1e-30)
    error = (actual.double() - truth).abs().max().item()
    if error <= limit:  # a NaN is not
        return None
    return f"{name} is off by {error:.3g}, more than {limit:.3g}"


def first(*problems: str | None) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def random(generator: torch.Generator, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(device, dtype)


def check_divide(
    sizes: Sizes, dtype: torch.dtype, queue_dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> str | None:
    images = random(generator, device, dtype, sizes.images, 3, sizes.side, sizes.side)
    leaf = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    patches, expected = divide(leaf, backend="triton"), divide(images, backend="torch")
    upstream = random(generator, device, dtype, *expected.shape)
    (gradient,) = torch.autograd.grad(patches, leaf, upstream)
    twin = images.clone().requires_grad_()
    (expected_gradient,) = torch.autograd.grad(divide(twin, backend="torch"), twin, upstream)
    return first(off("patches", patches, expected.double()), off("the gradient", gradient, expected_gradient.double()))


def check_combine(
    sizes: Sizes, dtype: torch.dtype, queue_dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> str | None:
    features = random(generator, device, dtype, 4 * sizes.images, sizes.features)
    leaf, twin = features.clone().requires_grad_(), features.double().requires_grad_()
    combined, expected = combine(leaf, sizes.k, backend="triton"), combine(twin, sizes.k, backend="torch")
    upstream = random(generator, device, dtype, *combined.shape)
    (gradient,) = torch.autograd.grad(combined, leaf, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, twin, upstream.double())
    return first(off("the mean", combined, expected), off("the gradient", gradient, expected_gradient))


def check_contrastive(
    sizes: Sizes, dtype: torch.dtype, queue_dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> str | None:
    n, width, subsets = sizes.images, sizes.width, len(combine(torch.empty(4, 1), sizes.k, backend="torch"))
    sides = [
        (random(generator, device, dtype, s * n, width), random(generator, device, dtype, n, width))
        for s in (subsets, subsets, 1, 1)
    ]
    leaves = [x.clone().requires_grad_() for pair in sides for x in pair]
    twins = [x.double().requires_grad_() for pair in sides for x in pair]
    mine, theirs = (list(zip(x[::2], x[1::2], strict=True)) for x in (leaves, twins))
    losses = torch.stack(contrastive_losses(mine, TEMPERATURE, backend="triton"))
    expected = torch.stack(contrastive_losses(theirs, TEMPERATURE, backend="torch"))
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], device=device)
    gradients = torch.autograd.grad((losses * weights).sum(), leaves)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), twins)
    pairs = zip(gradients, expected_gradients, strict=True)
    return first(off("the loss", losses, expected), *(off("a gradient", ours, truth) for ours, truth in pairs))


def check_neighbor(
    sizes: Sizes, dtype: torch.dtype, queue_dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> str | None:
    queries = random(generator, device, dtype, 2 * sizes.images, sizes.width)
    queue = torch.nn.functional.normalize(random(generator, device, torch.float32, sizes.queue, sizes.width))
    queue = queue.to(queue_dtype)
    nearest = nearest_neighbor(queries, queue, backend="triton")
    if not ((nearest >= 0) & (nearest < sizes.queue)).all():
        return "a row is outside the queue"
    truth = nearest_neighbor(queries.double(), queue.double(), backend="torch")
    score, best = (torch.linalg.vecdot(queries.double(), queue[rows].double()) for rows in (nearest, truth))
    return off("the score", score.float(), best)


def check_enqueue(
    sizes: Sizes, dtype: torch.dtype, queue_dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> str | None:
    rows = random(generator, device, dtype, sizes.images, sizes.width)
    queue = torch.zeros(sizes.queue, sizes.width, dtype=queue_dtype, device=device)
    expected, start = queue.double(), sizes.queue - sizes.images // 2 - 1  # over the end of the ring
    pointer, expected_pointer = (torch.tensor(start, device=device) for _ in range(2))
    for keep in (True, False):
        gate = torch.tensor(keep, device=device)
        enqueue(queue, pointer, rows, keep=gate, backend="triton")
        enqueue(expected, expected_pointer, rows.double(), keep=gate, backend="torch")
    if pointer != expected_pointer:
        return f"the pointer is {pointer.item()}, not {expected_pointer.item()}"
    return off("a row", queue, expected)


CHECKS = {
    "divide": check_divide,
    "combine": check_combine,
    "contrastive_losses": check_contrastive,
    "nearest_neighbor": check_neighbor,
    "enqueue": check_enqueue,
}
