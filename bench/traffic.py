"""`python -m bench.traffic`: launches and unique bytes of a step's operators, ours and eager PyTorch's, counted alike.

Nothing is run: ours are the launches that the operators make, with the closed forms that the tests hold against counts;
eager PyTorch is Algorithm 1 as printed (tests/oracles.py), or the loss as published (tests/method_oracles.py), on the
meta device.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mnclglf.methods import MNCLGLF
from mnclglf_kernels import augment
from mnclglf_kernels._triton.launch import Launch
from mnclglf_kernels.operators import OPERATORS, Example, OperatorName
from mnclglf_kernels.ops.augment import PARAMETERS, ViewFormat
from mnclglf_kernels.sizes import PAPER, VIEWS_PER_IMAGE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from method_oracles import nt_xent_as_published, queue_loss_as_published
from oracles import Algorithm1AsPrinted as reference

STEP = MNCLGLF.operators
OTHERS = tuple(op for op in OPERATORS if op not in STEP)


@dataclass
class Eager(TorchDispatchMode):
    """Counts within it, also on the meta device. An operation that makes no view is one launch, which is the least.

    Its bytes are those of its operands and results, each once; what it writes into is not also read.
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


class Row(NamedTuple):
    """One operator, or all together."""

    name: str
    launches: int
    eager_launches: int
    unique_bytes: int
    eager_bytes: int


def on_meta(*shape: int, dtype: torch.dtype, gradient: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=gradient)


def eager(op: OperatorName, dtype: torch.dtype) -> Eager:
    """The reference's launches and bytes of one operator in a step of the paper's sizes, forward and backward."""
    n, side, features, k, width, size, source = PAPER
    with Eager() as counted:
        if op == "augment":
            images, rows = (on_meta(n, 3, source, source, dtype=torch.uint8), on_meta(n, dtype=torch.int64))
            numbers = (
                on_meta(*shape, dtype=torch.float32) for shape in ((VIEWS_PER_IMAGE * n, len(PARAMETERS)), (3,), (3,))
            )
            augment(images, rows, *numbers, ViewFormat(side), dtype=dtype, backend="torch")
        elif op == "divide":
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
        elif op == "nt_xent":
            views = [on_meta(n, width, dtype=dtype, gradient=True) for _ in range(2)]
            nt_xent_as_published(*views, 1.0).backward(on_meta(dtype=dtype))
        elif op == "queue_contrastive_loss":
            queries, keys = (on_meta(n, width, dtype=dtype, gradient=asks) for asks in (True, False))
            loss = queue_loss_as_published(queries, keys, on_meta(size, width, dtype=dtype), 1.0)
            loss.backward(on_meta(dtype=dtype))
        else:
            for subsets in (6, 6, 1, 1):
                predictions = on_meta(n, width, dtype=dtype, gradient=True)
                loss = reference.contrastive_loss(on_meta(subsets * n, width, dtype=dtype), predictions, 1.0)
                loss.backward(on_meta(dtype=dtype))
    return counted


def ours(op: OperatorName, dtype: torch.dtype) -> list[Launch]:
    """Ours of the same work: no gradient of targets and keys, as in a step."""
    asked = OPERATORS[op].launches(Example(dtype=dtype))
    return [x for x in asked if not x.arguments.get("OF_TARGETS") and not x.arguments.get("OF_KEYS")]


def rows(dtype: torch.dtype, operators: Sequence[OperatorName]) -> list[Row]:
    """A row an operator, and their sum; augment against its own PyTorch form."""
    found: list[Row] = []
    for op in operators:
        mine, theirs = ours(op, dtype), eager(op, dtype)
        unique = sum(x.traffic.unique_bytes for x in mine)
        found.append(Row(op, len(mine), theirs.launches, unique, theirs.unique_bytes))
    return [*found, Row("together", *(sum(column) for column in zip(*(row[1:] for row in found), strict=True)))]


def main() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        print(f"\n{str(dtype).removeprefix('torch.')}, {' '.join(f'{k} {v}' for k, v in PAPER._asdict().items())}\n")
        print("| operator | launches | eager | ratio | unique MB | eager | ratio |\n|---|--:|--:|--:|--:|--:|--:|")
        for name, count, eager_count, moved, eager_moved in (*rows(dtype, STEP), *rows(dtype, OTHERS)[:-1]):
            print(
                f"| {name} | {count} | {eager_count} | {eager_count / count:.1f} "
                f"| {moved / 1e6:.1f} | {eager_moved / 1e6:.1f} | {eager_moved / moved:.1f} |"
            )


if __name__ == "__main__":
    main()
