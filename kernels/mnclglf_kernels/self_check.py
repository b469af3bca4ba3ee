"""The self-check before a run: every Triton kernel once against PyTorch in fp64, at the sizes of the run.

A kernel that was never seen on this GPU, driver or compiler is checked before it trains anything. What the check
compiles is what the run needs anyway.
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

UPSTREAM = 2.0**12  # gradient of a loss: keeps the fp16 gradients of its rows out of the subnormal numbers
WEIGHTS = (1.0, -2.0, 3.0, 0.5)  # of several losses: a gradient that goes to another pair is seen


def failures(
    sizes: Sizes,
    dtype: torch.dtype,
    queue_dtype: torch.dtype,
    device: torch.device,
    *,
    one_embedding: bool = False,
    operators: Sequence[OperatorName] | None = None,
) -> dict[OperatorName, str]:
    """Returns what is wrong with the Triton kernels of each operator; operators that pass are omitted.

    Args:
        sizes: of the run.
        dtype: of images, features and embeddings.
        queue_dtype: of the queue's rows.
        device: where to run.
        one_embedding: whether one of the S combinations is contrasted, not all.
        operators: those that the run uses; None for all.

    Raises:
        torch.OutOfMemoryError: the run does not fit this device, which says nothing of the kernels.
        RuntimeError: a kernel took the device's context down; nothing can run on it in this process.
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
        )
        try:
            problem = check(OPERATORS[name], example)
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


def check(row: Operator, example: Example) -> str | None:
    """Compares results and gradients in Triton with those of PyTorch in fp64; returns a problem, or None."""
    arguments = row.inputs(example)
    if row.check is not None:
        return row.check(example, arguments)
    twins = tree_map_only(Tensor, in_fp64, arguments)
    results = tree_leaves(row.function(**arguments, backend="triton"))
    expected = tree_leaves(row.function(**twins, backend="torch"))
    upstream = [upstream_of(example, i, x) for i, x in enumerate(results)]
    gradients = torch.autograd.grad(results, learning(arguments), upstream)
    expected_gradients = torch.autograd.grad(expected, learning(twins), [x.double() for x in upstream])
    pairs = [("the result", *pair) for pair in zip(results, expected, strict=True)]
    pairs += [("a gradient", *pair) for pair in zip(gradients, expected_gradients, strict=True)]
    problems = (row.tolerance.excess(name, actual, truth) for name, actual, truth in pairs)
    return next((problem for problem in problems if problem is not None), None)


def in_fp64(x: Tensor) -> Tensor:
    """Returns a copy of floating-point numbers in fp64, dense in the order of its dimensions, and of others as is."""
    if not x.is_floating_point():
        return x.clone()
    return x.detach().to(torch.float64, memory_format=torch.contiguous_format).requires_grad_(x.requires_grad)


def learning(arguments: dict[str, Any]) -> list[Tensor]:
    """Returns the tensors among an operator's arguments that ask for a gradient."""
    return [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.requires_grad]


def upstream_of(example: Example, place: int, result: Tensor) -> Tensor:
    """Returns the gradient that reaches one of an operator's results: random, or of a loss a number of its own."""
    if result.dim():
        return example.random(*result.shape, dtype=result.dtype)
    return torch.full_like(result, UPSTREAM * WEIGHTS[place % len(WEIGHTS)])


def check_context(name: OperatorName, problem: str, device: torch.device) -> None:
    """Raises RuntimeError where the device answers no more: after an illegal access every later call fails too."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        raise RuntimeError(
            f"the Triton kernel of {name} took the CUDA context down ({problem}); take --kernels off, and "
            "`make gpu-report` for a file to attach to an issue"
        ) from error
