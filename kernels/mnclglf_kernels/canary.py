"""Every Triton kernel once against PyTorch in fp64, at the sizes of the run that is about to start.

A kernel that was never seen on this GPU, driver or compiler proves itself before it trains anything; what it compiles
is what the run needs anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from mnclglf_kernels.augment import LARGEST_SIDE, ViewFormat, augment
from mnclglf_kernels.backend import Backend, first_line
from mnclglf_kernels.contrastive import contrastive_losses
from mnclglf_kernels.neighbor import nearest_neighbor
from mnclglf_kernels.nt_xent import nt_xent
from mnclglf_kernels.patches import combine, divide
from mnclglf_kernels.queue import enqueue
from mnclglf_kernels.queue_contrastive import queue_contrastive_loss
from mnclglf_kernels.sizes import OPERATORS, VIEWS, Operator, Sizes

TEMPERATURE = 0.1
UPSTREAM = 2.0**12  # of gradients: keeps those of fp16 out of its subnormal numbers


class Run(NamedTuple):
    """What a check needs to know of the run."""

    sizes: Sizes
    dtype: torch.dtype  # of images, features and embeddings
    queue_dtype: torch.dtype
    subsets: int  # S of the combined targets
    device: torch.device
    generator: torch.Generator

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)


def failures(
    sizes: Sizes,
    dtype: torch.dtype,
    queue_dtype: torch.dtype,
    device: torch.device,
    *,
    one_embedding: bool = False,
    operators: Sequence[Operator] = OPERATORS,
) -> dict[Operator, str]:
    """What went wrong with the Triton kernels of each operator; operators in order are not in it.

    Args:
        sizes: of the run.
        dtype: of images, features and embeddings.
        queue_dtype: of the queue's rows.
        device: where to run.
        one_embedding: whether one of the S combinations is contrasted, not all.
        operators: those that the run uses.

    Raises:
        torch.OutOfMemoryError: the run does not fit this device, which says nothing of the kernels.
        RuntimeError: a kernel took the device's context down; nothing can run on it in this process.
    """
    found: dict[Operator, str] = {}
    run = Run(sizes, dtype, queue_dtype, 1 if one_embedding else comb(4, sizes.k), device, torch.Generator())
    for name in operators:
        run.generator.manual_seed(0)
        try:
            problem = CHECKS[name](run)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a driver may raise
            problem = first_line(error)
        if problem is not None:
            found[name] = problem
            check_context(name, problem, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the fp64 copies, up to some GiB
    return found


def check_context(name: Operator, problem: str, device: torch.device) -> None:
    """RuntimeError where the device answers no more: after an illegal access every later call fails too."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        raise RuntimeError(
            f"the Triton kernel of {name} took the CUDA context down ({problem}); take --kernels off, and "
            "`make gpu-report` for a file to attach to an issue"
        ) from error


def excess(name: str, actual: Tensor, truth: Tensor) -> str | None:
    """How far a result is from the fp64 truth, where that is more than its dtype's roundings at its greatest value."""
    kind = torch.finfo(actual.dtype)
    limit = max(4 * kind.eps, 1e-4) * truth.abs().max().item() + kind.smallest_normal * kind.eps
    error = (actual.double() - truth).abs().max().item()
    if error <= limit:  # a NaN is not
        return None
    return f"{name} is off by {error:.3g}, more than {limit:.3g}"


def first_problem(*problems: str | None) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def check_augment(run: Run) -> str | None:
    n, side, source = run.sizes.images, run.sizes.side, run.sizes.source
    if max(side, source) > LARGEST_SIDE:
        return None  # such runs do without it
    images = torch.randint(256, (n, 3, source, source), generator=run.generator, dtype=torch.uint8).to(run.device)
    rows = torch.randperm(n, generator=run.generator).to(run.device)
    u = torch.rand(VIEWS * n, 13, generator=run.generator).to(run.device)
    start, length = (u[:, 1:3] * source / 2).floor(), (u[:, 3:5] * source / 2).floor() + 1
    on = (u[:, [5, 10]] > 0.5).float()
    numbers = [360 * u[:, :1] - 180, start, length, on[:, :1], 0.5 + u[:, 6:9], u[:, 9:10] - 0.5, on[:, 1:], u[:, 11:12]]
    numbers[-1] = numbers[-1].where(u[:, :1] > 0.3, 0.0) * 2
    numbers.append((u[:, 12:] > 0.5).float())  # solarize
    parameters, mean, std = torch.cat(numbers, 1), u[0, :3], 0.5 + u[1, :3]
    for format in (ViewFormat(side), ViewFormat(side, cubic=False, rotates=True)):
        views = augment(images, rows, parameters, mean, std, format, dtype=run.dtype, backend="triton")
        doubles = parameters.double(), mean.double(), std.double()
        truth = augment(images, rows, *doubles, format, dtype=torch.float64, backend="torch")
        # Seldom a sum within rounding of a half becomes another whole level; two of them and the jitter stay below 8.
        error = (views.double() - truth).abs() - torch.finfo(run.dtype).eps * truth.abs()
        levels = (255 * std.double().view(3, 1, 1) * error).nan_to_num(torch.inf)
        share = (levels > 0.1).double().mean().item()
        if levels.max() > 8 or share > 0.02:
            return (
                f"a view is off by {levels.max().item():.3g} levels at most, {share:.2%} of its pixels by more than 0.1"
            )
    return None


def check_divide(run: Run) -> str | None:
    images = run.random(run.sizes.images, 3, run.sizes.side, run.sizes.side)
    leaf = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    twin = images.clone().requires_grad_()
    patches, expected = divide(leaf, backend="triton"), divide(twin, backend="torch")
    upstream = run.random(*expected.shape)
    (gradient,) = torch.autograd.grad(patches, leaf, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, twin, upstream)
    return first_problem(
        excess("a patch", patches, expected.double()), excess("the gradient", gradient, expected_gradient.double())
    )


def check_combine(run: Run) -> str | None:
    features, k = run.random(4 * run.sizes.images, run.sizes.features), run.sizes.k
    leaf, twin = features.clone().requires_grad_(), features.double().requires_grad_()
    combined, expected = combine(leaf, k, backend="triton"), combine(twin, k, backend="torch")
    upstream = run.random(*combined.shape)
    (gradient,) = torch.autograd.grad(combined, leaf, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, twin, upstream.double())
    return first_problem(excess("the mean", combined, expected), excess("the gradient", gradient, expected_gradient))


def check_contrastive(run: Run) -> str | None:
    n, width = run.sizes.images, run.sizes.width
    # Rows that resemble each other, and their positives most: every part of softmax and gradient weighs in the result.
    common = run.random(1, width)
    leaves: list[Tensor] = []
    for subsets, dtype in ((run.subsets, run.dtype), (run.subsets, run.dtype), *[(1, run.queue_dtype)] * 2):
        predictions = common + run.random(n, width) / 2
        targets = predictions.repeat(subsets, 1) + run.random(subsets * n, width) / 2
        leaves += [targets.to(dtype).requires_grad_(), predictions.detach().requires_grad_()]
    twins = [x.detach().double().requires_grad_() for x in leaves]
    mine, theirs = (list(zip(x[::2], x[1::2], strict=True)) for x in (leaves, twins))
    losses = torch.stack(contrastive_losses(mine, TEMPERATURE, backend="triton"))
    expected = torch.stack(contrastive_losses(theirs, TEMPERATURE, backend="torch"))
    weights = UPSTREAM * torch.tensor([1.0, -2.0, 3.0, 0.5], device=run.device)
    gradients = torch.autograd.grad((losses * weights).sum(), leaves)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), twins)
    pairs = zip(gradients, expected_gradients, strict=True)
    return first_problem(
        excess("the loss", losses, expected), *(excess("a gradient", ours, truth) for ours, truth in pairs)
    )


def check_loss(loss: Callable[..., Tensor], rows: Sequence[Tensor]) -> str | None:
    """Of a loss of some rows: value and gradients."""
    leaves = [x.detach().requires_grad_() for x in rows]
    twins = [x.detach().double().requires_grad_() for x in rows]
    value, expected = loss(*leaves, TEMPERATURE, backend="triton"), loss(*twins, TEMPERATURE, backend="torch")
    gradients = torch.autograd.grad(UPSTREAM * value, leaves)
    pairs = zip(gradients, torch.autograd.grad(UPSTREAM * expected, twins), strict=True)
    return first_problem(
        excess("the loss", value, expected), *(excess("a gradient", ours, truth) for ours, truth in pairs)
    )


def check_nt_xent(run: Run) -> str | None:
    n, width = run.sizes.images, run.sizes.width
    first = run.random(1, width) + run.random(n, width) / 2  # as in check_contrastive
    return check_loss(nt_xent, [first, first + run.random(n, width) / 2])


def check_queue_contrastive(run: Run) -> str | None:
    n, width = run.sizes.images, run.sizes.width
    common = run.random(1, width)
    queries = common + run.random(n, width) / 2
    keys, negatives = queries + run.random(n, width) / 2, common + run.random(run.sizes.queue, width) / 2
    queue = torch.nn.functional.normalize(negatives.float()).to(run.queue_dtype)

    def loss(queries: Tensor, temperature: float, *, backend: Backend) -> Tensor:
        return queue_contrastive_loss(queries, keys, queue, temperature, backend=backend)

    return check_loss(loss, [queries])


def check_neighbor(run: Run) -> str | None:
    queries = run.random(2 * run.sizes.images, run.sizes.width)
    queue = torch.nn.functional.normalize(run.random(run.sizes.queue, run.sizes.width, dtype=torch.float32))
    queue = queue.to(run.queue_dtype)
    nearest = nearest_neighbor(queries, queue, backend="triton")
    if not ((nearest >= 0) & (nearest < run.sizes.queue)).all():
        return "a row is outside the queue"
    truth = nearest_neighbor(queries.double(), queue.double(), backend="torch")
    score, best = (torch.linalg.vecdot(queries.double(), queue[rows].double()) for rows in (nearest, truth))
    return excess("the score", score.float(), best)


def check_enqueue(run: Run) -> str | None:
    rows, size = run.random(run.sizes.images, run.sizes.width), run.sizes.queue
    queue = torch.zeros(size, run.sizes.width, dtype=run.queue_dtype, device=run.device)
    expected, start = queue.double(), size - run.sizes.images // 2 - 1  # over the end of the ring
    pointer, expected_pointer = (torch.tensor(start, device=run.device) for _ in range(2))
    for keep in (True, False):
        gate = torch.tensor(keep, device=run.device)
        enqueue(queue, pointer, rows, keep=gate, backend="triton")
        enqueue(expected, expected_pointer, rows.double(), keep=gate, backend="torch")
    if pointer != expected_pointer:
        return f"the pointer is {pointer.item()}, not {expected_pointer.item()}"
    return excess("a row", queue, expected)


CHECKS: dict[Operator, Callable[[Run], str | None]] = {
    "augment": check_augment,
    "divide": check_divide,
    "combine": check_combine,
    "contrastive_losses": check_contrastive,
    "nearest_neighbor": check_neighbor,
    "enqueue": check_enqueue,
    "nt_xent": check_nt_xent,
    "queue_contrastive_loss": check_queue_contrastive,
}
