"""Self-check before a run: each Triton kernel runs once and is compared with PyTorch in fp64, at the run's sizes.

So a kernel is checked on this GPU, driver and compiler before it trains anything. The compilations are not wasted: the
run needs the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mnclglf_kernels.backend import first_line
from mnclglf_kernels.operators import OPERATORS, Example, Operator, OperatorName
from mnclglf_kernels.sizes import Sizes

UPSTREAM = 2.0**12  # gradient of a loss; keeps the fp16 gradients of the rows above the subnormal range
WEIGHTS = (1.0, -2.0, 3.0, 0.5)  # one per loss, all different: a gradient that goes to the wrong pair shows


def failures(
    sizes: Sizes,
    dtype: torch.dtype,
    queue_dtype: torch.dtype,
    device: torch.device,
    *,
    one_embedding: bool = False,
    operators: Sequence[OperatorName] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> dict[OperatorName, str]:
    """Returns the problem of each operator whose Triton kernels fail; operators that pass are omitted.

    Args:
        sizes: sizes of the run, with the images of one rank.
        dtype: dtype of images, features and embeddings.
        queue_dtype: dtype of the queue's rows.
        device: device to run on.
        one_embedding: true if the run contrasts one of the S combinations instead of all.
        operators: operators that the run uses; None for all.
        rank, ranks: this process of the run, and their number.

    Raises:
        torch.OutOfMemoryError: the run does not fit this device. This is no fault of a kernel.
        RuntimeError: a kernel broke the CUDA context. Nothing more can run on the device in this process.
    """
    found: dict[OperatorName, str] = {}
    for name in OPERATORS if operators is None else operators:
        example = Example(
            sizes=sizes,
            dtype=dtype,
            queue_dtype=queue_dtype,
            device=device,
            generator=torch.Generator().manual_seed(0),
            one_embedding=one_embedding,
            rank=rank,
            ranks=ranks,
        )
        try:
            problem = check(OPERATORS[name], example)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler or a driver may raise anything
            problem = first_line(error)
        if problem is not None:
            found[name] = problem
            check_context(name, problem, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the fp64 copies take up to some GiB
    return found


def check(row: Operator, example: Example) -> str | None:
    """Compares Triton with PyTorch in fp64 for every variant of a row's example; returns the problem, or None."""
    arguments = row.inputs(example)
    if row.check is not None:
        return row.check(example, arguments)
    problems = (compare(row, example, arguments | changes) for changes in row.variants)
    return next((problem for problem in problems if problem is not None), None)


def compare(row: Operator, example: Example, arguments: dict[str, Any]) -> str | None:
    """Compares the results of one call, the gradients, and the arguments after it, which it may have written into."""
    given = tree_map_only(Tensor, lambda x: x if x.requires_grad else x.clone(), arguments)
    twins = tree_map_only(Tensor, in_fp64, arguments)
    results = tree_leaves(row.function(**given, backend="triton"))
    expected = tree_leaves(row.function(**twins, backend="torch"))
    upstream = [upstream_of(example, i, x) for i, x in enumerate(results)]
    gradients = torch.autograd.grad(results, learning(given), upstream)
    expected_gradients = torch.autograd.grad(expected, learning(twins), [x.double() for x in upstream])
    pairs = [("the result", *pair) for pair in zip(results, expected, strict=True)]
    pairs += [("a gradient", *pair) for pair in zip(gradients, expected_gradients, strict=True)]
    pairs += [("an argument", *pair) for pair in zip(fixed(given), fixed(twins), strict=True)]
    problems = (row.tolerance.excess(name, actual, truth) for name, actual, truth in pairs)
    return next((problem for problem in problems if problem is not None), None)


def in_fp64(x: Tensor) -> Tensor:
    """Returns a copy: a contiguous one in fp64 for floating-point tensors, an unchanged one for others."""
    if not x.is_floating_point():
        return x.clone()
    return x.detach().to(torch.float64, memory_format=torch.contiguous_format).requires_grad_(x.requires_grad)


def learning(arguments: dict[str, Any]) -> list[Tensor]:
    """Returns the tensors among an operator's arguments that require a gradient."""
    return [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.requires_grad]


def fixed(arguments: dict[str, Any]) -> list[Tensor]:
    """Returns the floating-point tensors among an operator's arguments that require no gradient."""
    tensors = [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.is_floating_point()]
    return [x for x in tensors if not x.requires_grad]


def upstream_of(example: Example, place: int, result: Tensor) -> Tensor:
    """Returns the upstream gradient of one result: random numbers, or for a scalar loss a distinct number."""
    if result.dim():
        return example.random(*result.shape, dtype=result.dtype)
    return torch.full_like(result, UPSTREAM * WEIGHTS[place % len(WEIGHTS)])


def check_context(name: OperatorName, problem: str, device: torch.device) -> None:
    """Raises RuntimeError if the device no longer responds: after an illegal access every later call fails too."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        raise RuntimeError(
            f"the Triton kernel of {name} took the CUDA context down ({problem}); take --kernels off, and "
            "report it; in a checkout, `make gpu-day` writes a file to attach"
        ) from error
