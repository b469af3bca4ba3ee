"""A stand-in for the module cudnn: it computes a graph with PyTorch on the tensors that a plan is given."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

WORKSPACE = 48
DTYPES = {"HALF": torch.float16, "BFLOAT16": torch.bfloat16, "FLOAT": torch.float32}


class NotSupported(Exception):
    """cuDNN has no plan."""


class FakeTensor:
    """A tensor of a graph: its declaration, and how it is computed from the given ones."""

    def __init__(self, compute: Callable[[dict[FakeTensor, Tensor]], Tensor] | None = None, **declared: Any) -> None:
        self.compute, self.declared, self.is_output = compute, declared, False

    def set_output(self, value: bool) -> FakeTensor:
        self.is_output = value
        return self

    def set_dim(self, dim: list[int]) -> FakeTensor:
        self.declared["dim"] = dim
        return self

    def set_stride(self, stride: list[int]) -> FakeTensor:
        self.declared["stride"] = stride
        return self

    def set_data_type(self, dtype: str) -> FakeTensor:
        self.declared["data_type"] = dtype
        return self

    def seen(self, given: Tensor) -> Tensor:
        """Returns the memory of a given tensor as it is declared; asserts that it is as large, and of this dtype."""
        dim, stride = self.declared["dim"], self.declared["stride"]
        assert given.dtype == DTYPES[self.declared["data_type"]]
        assert given.numel() == torch.Size(dim).numel()
        assert given.data_ptr() % 16 == 0
        viewed = torch.as_strided(given, dim, stride, given.storage_offset())
        if given.dim() == len(dim):
            assert given.shape == viewed.shape
            assert torch.equal(given, viewed) or not given.isfinite().all()
        return viewed

    def value(self, pack: dict[FakeTensor, Tensor]) -> Tensor:
        """Returns the value in fp64, rounded as declared."""
        if self.compute is None:
            return self.seen(pack[self]).double()
        made = self.compute(pack)
        dtype = self.declared.get("data_type")
        return made.to(DTYPES[dtype]).double() if dtype else made


class Cudnn:
    """The module.

    Attributes:
        refuses: tells for a graph's operations whether cuDNN has no plan.
        spoils: tells for a graph's operations whether its results are wrong.
        executed: the operations, the stream and the sums' dtype of each graph that ran.
    """

    data_type = SimpleNamespace(HALF="HALF", BFLOAT16="BFLOAT16", FLOAT="FLOAT")
    heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")
    build_plan_policy = SimpleNamespace(HEURISTICS_CHOICE="HEURISTICS_CHOICE")

    def __init__(self) -> None:
        self.refuses: Callable[[list[str]], bool] = lambda operations: False
        self.spoils: Callable[[list[str]], bool] = lambda operations: False
        self.executed: list[tuple[list[str], int, str]] = []
        self.built = 0

    def create_handle(self) -> Any:
        return SimpleNamespace(stream=None)

    def set_stream(self, handle: Any, stream: int) -> None:
        handle.stream = stream

    def pygraph(self, *, handle: Any, **_: Any) -> FakeGraph:
        assert handle.stream is None or isinstance(handle.stream, int)
        return FakeGraph(self)


class FakeGraph:
    def __init__(self, cudnn: Cudnn) -> None:
        self.cudnn, self.made, self.operations, self.sums = cudnn, [], [], ""
        self.steps: list[str] = []

    def node(self, operation: str, compute: Callable[[dict[FakeTensor, Tensor]], Tensor]) -> FakeTensor:
        self.operations.append(operation)
        self.made.append(FakeTensor(compute))
        return self.made[-1]

    def tensor(self, name: str, **declared: Any) -> FakeTensor:
        return FakeTensor(**declared)

    def mul(self, a: FakeTensor, b: FakeTensor) -> FakeTensor:
        return self.node("mul", lambda pack: a.value(pack) * b.value(pack))

    def add(self, a: FakeTensor, b: FakeTensor) -> FakeTensor:
        return self.node("add", lambda pack: a.value(pack) + b.value(pack))

    def relu(self, a: FakeTensor) -> FakeTensor:
        return self.node("relu", lambda pack: F.relu(a.value(pack)))

    def conv_fprop(self, image: FakeTensor, weight: FakeTensor, compute_data_type: str, **how: Any) -> FakeTensor:
        self.sums = compute_data_type
        return self.node("fprop", lambda pack: F.conv2d(image.value(pack), weight.value(pack), **how))

    def conv_dgrad(self, loss: FakeTensor, filter: FakeTensor, compute_data_type: str, **how: Any) -> FakeTensor:
        self.sums = compute_data_type
        made = self.node("dgrad", lambda pack: _input_gradient(made, loss, filter, pack, how))
        return made

    def genstats(self, y: FakeTensor) -> tuple[FakeTensor, FakeTensor]:
        first = self.node("sum", lambda pack: y.value(pack).sum((0, 2, 3), keepdim=True))
        return first, self.node("squares", lambda pack: y.value(pack).square().sum((0, 2, 3), keepdim=True))

    def validate(self) -> None:
        self.steps.append("validate")

    def build_operation_graph(self) -> None:
        self.steps.append("operations")

    def create_execution_plans(self, modes: list[str]) -> None:
        assert modes == ["A", "FALLBACK"]
        if self.cudnn.refuses(self.operations):
            raise NotSupported("no engine")
        self.steps.append("plans")

    def check_support(self) -> None:
        self.steps.append("support")

    def build_plans(self, policy: str) -> None:
        assert self.steps == ["validate", "operations", "plans", "support"]
        self.cudnn.built += 1

    def get_workspace_size(self) -> int:
        return WORKSPACE

    def execute(self, pack: dict[FakeTensor, Tensor], workspace: Tensor, handle: Any) -> None:
        assert (workspace.dtype, workspace.numel()) == (torch.uint8, WORKSPACE)
        self.cudnn.executed.append((self.operations, handle.stream, self.sums))
        for made in [x for x in self.made if x.is_output]:
            result = made.seen(pack[made])
            result.copy_(made.value(pack) * (1.5 if self.cudnn.spoils(self.operations) else 1))


def _input_gradient(
    made: FakeTensor, loss: FakeTensor, weight: FakeTensor, pack: dict[FakeTensor, Tensor], how: dict[str, Any]
) -> Tensor:
    size = made.declared["dim"]
    return conv2d_input(size, weight.value(pack), loss.value(pack), **how)
