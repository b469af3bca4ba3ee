"""Calls of the operators in the table at small sizes, for tests that hold for each operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mnclglf_kernels.operators import OPERATORS, Arguments, Example, OperatorName
from mnclglf_kernels.self_check import learning
from mnclglf_kernels.sizes import Sizes

SMALL = Sizes(images=6, side=8, features=12, k=2, width=20, queue=40, source=9)


def arguments_of(
    name: OperatorName,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    sizes: Sizes = SMALL,
) -> Arguments:
    """Returns the arguments of a call, the same numbers each time."""
    generator = torch.Generator().manual_seed(7)
    return OPERATORS[name].inputs(Example(sizes=sizes, dtype=dtype, device=torch.device(device), generator=generator))


def copied(arguments: Arguments) -> Arguments:
    """Returns copies with the same strides, which require gradients where the given ones do."""
    return tree_map_only(Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), arguments)


def tensors_in(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def outcomes(function: Callable[..., Any], arguments: Arguments, **how: Any) -> dict[str, list[Tensor]]:
    """Calls a function of these arguments on copies of them.

    Returns:
        "results": its tensors. "gradients": of each argument that requires one, for another upstream gradient per
        result. "arguments": the copies after the call, since an operator may write into them.
    """
    given = copied(arguments)
    results = tensors_in(function(**given, **how))
    leaves, gradients = learning(given), []
    if leaves:
        differentiable = [x for x in results if x.requires_grad]
        upstream = [torch.full_like(x, place) for place, x in enumerate(differentiable, start=1)]
        gradients = list(torch.autograd.grad(differentiable, leaves, upstream))
    after = [x.detach() for x in tensors_in(given)]
    return {"results": [x.detach() for x in results], "gradients": gradients, "arguments": after}
