"""A CUDA graph on a CPU: a recording of every operation, which is replayed on the same tensors without its Python code.

As in a real graph, tensors are where they were as it was recorded, and everything else (numbers, branches, which
operations there are) is part of the recording. Reading a value on the host is an error while it is recorded.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

T = TypeVar("T")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")
Operation = tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]


class Recording(TorchDispatchMode):
    """Records the operations within it, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: aten::{name}")
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or name.startswith(("empty", "new_empty")) or name == "detach"):
            given = tree_map(lambda x: x, (args, kwargs or {}))  # lists of its own, the same tensors
            self.operations.append((func, *given, tree_leaves(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Computes each operation again, with its results where they were."""
        for func, args, kwargs, results in self.operations:
            for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(run: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
    """Does on a CPU what whole_step.record does on a GPU."""
    assert device.type == "cpu"
    run()
    with Recording() as recording:
        result = run()
    return recording.replay, result
