"""Tests each operator of torch.ops.mnclglf with opcheck: schema, fake tensors, autograd, AOT dispatch.

The calls are those that the table's operators make, forward and backward, and some with other dtypes and strides.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from table import arguments_of, outcomes
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mnclglf_kernels.operators import OPERATORS

CHANNELS_LAST = torch.channels_last
# opcheck itself causes this warning.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Recorder(TorchDispatchMode):
    """Records the calls of torch.ops.mnclglf: operator and positional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "mnclglf":
            assert not kwargs
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def calls_of(name: str, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """Returns the calls that an operator and its backward pass make on the table's example."""
    with Recorder() as recorder:
        outcomes(OPERATORS[name].function, arguments_of(name, dtype), backend="triton")
    return recorder.calls


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def plain(x: Tensor) -> Tensor:
    return x.detach().clone()


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_calls_of_an_operator(name: str, dtype: torch.dtype):
    calls = calls_of(name, dtype)
    assert calls
    for operator, arguments in calls:
        # There is no second derivative; one that writes into an argument gets its formula around it, not from here.
        kind = plain if operator._opname.endswith("_backward") or operator._schema.is_mutable else leaf
        opcheck(operator, tree_map_only(Tensor, kind, arguments))


def learner(x: Tensor) -> Tensor:
    return x.requires_grad_()


def pairs(learn: tuple[bool, ...] = (False,) * 4, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], ...]:
    """Returns targets of S = 2 and S = 1 and their predictions; `learn` is the requires_grad of all four, in order."""
    rows = [
        torch.randn(count, 4).to(dtype).requires_grad_(asks) for count, asks in zip((10, 5, 5, 5), learn, strict=True)
    ]
    return rows[:2], rows[2:]


def backward_of(of_targets: bool, of_predictions: bool, rank: int = 0, ranks: int = 1) -> tuple[Any, ...]:
    targets, predictions = pairs()
    targets = [rows[: len(rows) // ranks] for rows in targets]
    _, *saved = torch.ops.mnclglf.contrastive_losses(targets, predictions, 0.5, rank, ranks)
    return torch.randn(2), targets, predictions, *saved, 0.5, of_targets, of_predictions, rank, ranks


def nt_xent_backward_of(rank: int, ranks: int) -> tuple[Any, ...]:
    rows = torch.randn(12, 4)
    losses, *saved = torch.ops.mnclglf.nt_xent(rows, 0.5, rank, ranks)
    return torch.randn_like(losses), rows, *saved, 0.5, rank, ranks


def queue_backward_of(of_queries: bool, of_keys: bool) -> tuple[Any, ...]:
    given = [torch.randn(rows, 4) for rows in (5, 5, 9)]
    losses, *saved = torch.ops.mnclglf.queue_contrastive_loss(*given, 0.5)
    return torch.randn_like(losses), *given, *saved, 0.5, of_queries, of_keys


def ring(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(9, 4).to(dtype), torch.tensor(7), torch.randn(5, 4)


def batch_norm_call(
    x: Tensor, residual: Tensor | None, relu: bool, running: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """Returns the operands of a call with two views."""
    weight, bias, mean, variance = torch.rand(4, x.shape[1]).to(dtype).unbind()
    kept = (mean, variance) if running else (None, None)
    return x, weight, bias, *kept, residual, [0.5, 0.25, 0.25], 1e-5, relu


def batch_norm_backward_call(
    x: Tensor, relu: bool, y: Tensor | None = None, other: Tensor | None = None
) -> tuple[Any, ...]:
    weight, bias = torch.rand(2, x.shape[1])
    mean, deviation = torch.rand(2, 2, x.shape[1])
    return torch.randn(x.shape), other, x, y, weight, bias, mean, deviation, relu, y is not None


# ranks.py: these need several processes, so tests/kernels/ops/test_batch_norm_over_ranks.py checks them.
MESSAGES = {"gather", "gather_rows", "sum_rows", "sum_over_ranks"}

# Strides, mixed dtypes, and choices of what learns that the examples do not have.
FURTHER: dict[str, list[Callable[[], tuple[Any, ...]]]] = {
    "divide": [
        lambda: (torch.randn(3, 4, 6, 8),),
        lambda: (learner(torch.randn(3, 4, 6, 8).contiguous(memory_format=CHANNELS_LAST)),),
        lambda: (learner(torch.randn(3, 4, 6, 8).bfloat16().transpose(2, 3)),),
    ],
    "divide_backward": [lambda: (torch.randn(12, 4, 3, 2).half().contiguous(memory_format=CHANNELS_LAST),)],
    "combine": [lambda: (learner(torch.randn(5, 12, dtype=torch.float64).t()), 1)],
    "combine_backward": [lambda: (torch.ones(1, 1).expand(12, 5), 3)],
    "enqueue": [lambda: (*ring(), None), lambda: (*ring(torch.bfloat16), torch.tensor(False))],
    "nearest_neighbor": [
        lambda: (torch.randn(5, 4), torch.randn(9, 4)),
        lambda: (torch.randn(4, 5).t(), torch.randn(9, 4).bfloat16()),
    ],
    "screened_nearest_neighbor": [
        lambda: (torch.randn(5, 4), torch.randn(9, 4)),
        lambda: (torch.randn(4, 5).t().half(), torch.randn(9, 4).bfloat16()),
    ],
    "faiss_nearest_neighbor": [
        lambda: (torch.randn(5, 4), torch.randn(9, 4)),
        lambda: (torch.randn(4, 5).t(), torch.randn(9, 4).bfloat16()),
        lambda: (torch.randn(0, 4), torch.randn(9, 4)),
    ],
    "contrastive_losses": [
        lambda: (*pairs(), 0.5),
        lambda: (*pairs((False, False, True, True), torch.bfloat16), 0.5),
        lambda: (*pairs((True, False, False, True)), 0.5),
        lambda: (*pairs((True,) * 4), 0.5, 3, 5),
    ],
    "contrastive_losses_backward": [
        lambda: backward_of(True, False),
        lambda: backward_of(False, True),
        lambda: backward_of(True, True, 3, 5),
    ],
    "batch_norm": [
        lambda: batch_norm_call(torch.randn(4, 5), None, False),
        lambda: batch_norm_call(torch.randn(4, 5).bfloat16(), None, True, running=False),
        lambda: batch_norm_call(torch.randn(4, 5, 3, 2).half(), torch.randn(4, 5, 2, 3).half().transpose(2, 3), True),
        lambda: batch_norm_call(torch.randn(4, 5, 2, 2).double(), torch.ones(4, 5, 2, 2).double(), False),
    ],
    "batch_norm_backward": [
        lambda: batch_norm_backward_call(torch.randn(4, 5), False),
        lambda: batch_norm_backward_call(torch.randn(4, 5, 3, 2), True),
        lambda: batch_norm_backward_call(torch.randn(4, 5, 3, 2), True, other=torch.randn(4, 5, 2, 3).transpose(2, 3)),
        lambda: batch_norm_backward_call(
            torch.randn(4, 5, 3, 2), True, torch.randn(4, 5, 3, 2).contiguous(memory_format=CHANNELS_LAST)
        ),
    ],
    "convolution": [
        lambda: (torch.randn(2, 16, 3, 5), torch.randn(32, 16, 3, 3), None, None, 1),
        lambda: (
            torch.randn(4, 16, 3, 2).half().contiguous(memory_format=CHANNELS_LAST),
            torch.randn(16, 16, 3, 3).half(),
            *torch.randn(2, 16, 2).mT.unbind(),
            2,
        ),
    ],
    "cudnn_convolution": [
        lambda: (torch.randn(4, 3, 7, 5).half(), torch.randn(6, 3, 3, 3).half(), None, None, 2, 1, 2, True),
        lambda: (torch.randn(2, 16, 3, 2), torch.randn(8, 16, 1, 1), *torch.randn(2, 1, 16).unbind(), 1, 0, 1, False),
    ],
    "cudnn_conv2d": [
        lambda: (learner(torch.randn(2, 3, 7, 5)), learner(torch.randn(6, 3, 3, 3)), 2, 1, True, True),
        lambda: (learner(torch.randn(2, 3, 7, 5)), torch.randn(6, 3, 3, 3), 1, 0, True, False),
        lambda: (torch.randn(2, 3, 7, 5), learner(torch.randn(6, 3, 3, 3)), 1, 0, False, True),
    ],
    "cudnn_conv2d_backward": [
        lambda of=of: (torch.randn(2, 6, 4, 3), torch.randn(2, 3, 7, 5), torch.randn(6, 3, 3, 3), 2, 1, True, *of)
        for of in ((True, True), (True, False), (False, True))
    ],
    "nt_xent": [
        lambda: (torch.randn(10, 4), 0.5),
        lambda: (learner(torch.randn(12, 4)), 0.5, 1, 3),
    ],
    "nt_xent_backward": [lambda: nt_xent_backward_of(1, 3)],
    "queue_contrastive_loss": [
        lambda: (torch.randn(5, 4), torch.randn(5, 4), torch.randn(9, 4), 0.5),
        lambda: (learner(torch.randn(5, 4)), torch.randn(5, 4), torch.randn(9, 4).bfloat16(), 0.5),
        lambda: (learner(torch.randn(5, 4).half()), learner(torch.randn(5, 4).half()), torch.randn(9, 4), 0.5),
    ],
    "queue_contrastive_loss_backward": [
        lambda: queue_backward_of(True, True),
        lambda: queue_backward_of(False, True),
    ],
}


@pytest.mark.parametrize(("name", "make"), [(name, make) for name, makers in FURTHER.items() for make in makers])
def test_further_calls(name: str, make: Callable[[], tuple[Any, ...]]):
    opcheck(getattr(torch.ops.mnclglf, name), make())


def test_every_registered_operator_is_checked():
    registered = {
        name.removeprefix("mnclglf::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("mnclglf::")
    }
    called = {operator._opname for name in OPERATORS for operator, _ in calls_of(name, torch.float32)}
    assert registered <= called | FURTHER.keys() | MESSAGES
