"""`python -m bench.traffic`: counts launches and unique bytes of the operators, ours and eager PyTorch's alike.

Nothing runs. Ours are the launches that an operator makes, with the closed forms that the tests check against counts.
Eager PyTorch is the operator's reference form (bench/reference.py) on the meta device, and of augment its own PyTorch
form.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.operator_cases import bench_of, torch_form
from mnclglf.methods import MNCLGLF
from mnclglf_kernels._triton.launch import Launch
from mnclglf_kernels.operators import OPERATORS, Example, Operator
from mnclglf_kernels.sizes import PAPER


@dataclass
class Eager(TorchDispatchMode):
    """Counts the operations within it, also on the meta device.

    An operation is one launch, which is the least, unless it makes a view or empty memory. Its bytes are those of its
    operands and results, each once; a result that is written in place is not also read.
    """

    launches: int = 0
    unique_bytes: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        empty = func in (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default)
        if not (func.is_view or empty or func == torch.ops.aten.detach.default):
            self.launches += 1
            if func == torch.ops.aten.index_put_.default:  # writes its values over some rows of its first operand
                args, result = (args[1], args[2], args[2].detach().clone()), None
            tensors = [
                x for x in (*tree_leaves(args), *tree_leaves(kwargs), *tree_leaves(result)) if isinstance(x, Tensor)
            ]
            self.unique_bytes += sum({id(x): x.numel() * x.itemsize for x in tensors}.values())
        return result


class OperatorTraffic(NamedTuple):
    """Launches and unique bytes of one operator, or of several together."""

    name: str
    launches: int
    eager_launches: int
    unique_bytes: int
    eager_bytes: int


def eager(row: Operator, dtype: torch.dtype) -> Eager:
    """Counts the reference form, forward and backward, at the paper's sizes."""
    bench = bench_of(row)
    inputs = row.inputs(Example(sizes=PAPER, dtype=dtype))
    for targets, _ in inputs.get("pairs", ()):  # in a step no gradient reaches the targets
        targets.requires_grad_(False)
    reference = bench.reference if bench.on_meta else partial(torch_form, row)
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    with Eager() as counted:
        outputs = reference(**inputs)
    upstream = [torch.empty_like(output) for output in outputs]
    with counted:
        if leaves:
            torch.autograd.grad(outputs, leaves, upstream)
    return counted


def ours(row: Operator, dtype: torch.dtype) -> list[Launch]:
    """Returns our launches for the same work: as in a step, targets and keys need no gradient."""
    launches = row.launches(Example(sizes=PAPER, dtype=dtype), arch=86)
    return [x for x in launches if not x.arguments.get("OF_TARGETS") and not x.arguments.get("OF_KEYS")]


def operator_traffic(row: Operator, dtype: torch.dtype) -> OperatorTraffic:
    """Counts one operator; augment is compared with its own PyTorch form."""
    mine, theirs = ours(row, dtype), eager(row, dtype)
    unique = sum(x.traffic.unique_bytes for x in mine)
    return OperatorTraffic(row.name, len(mine), theirs.launches, unique, theirs.unique_bytes)


def step_traffic(dtype: torch.dtype) -> list[OperatorTraffic]:
    """Counts the operators of MNCLGLF's step, and their sum."""
    found = [operator_traffic(OPERATORS[name], dtype) for name in MNCLGLF.operators]
    sums = (sum(column) for column in zip(*(row[1:] for row in found), strict=True))
    return [*found, OperatorTraffic("together", *sums)]


def other_traffic(dtype: torch.dtype) -> list[OperatorTraffic]:
    """Counts the operators that MNCLGLF's step does not use."""
    return [operator_traffic(row, dtype) for name, row in OPERATORS.items() if name not in MNCLGLF.operators]


def main() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        print(f"\n{str(dtype).removeprefix('torch.')}, {' '.join(f'{k} {v}' for k, v in PAPER._asdict().items())}\n")
        print("| operator | launches | eager | ratio | unique MB | eager | ratio |\n|---|--:|--:|--:|--:|--:|--:|")
        for name, count, eager_count, moved, eager_moved in (*step_traffic(dtype), *other_traffic(dtype)):
            print(
                f"| {name} | {count} | {eager_count} | {eager_count / count:.1f} "
                f"| {moved / 1e6:.1f} | {eager_moved / 1e6:.1f} | {eager_moved / moved:.1f} |"
            )


if __name__ == "__main__":
    main()
